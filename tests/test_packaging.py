"""Installed as a user would: the linked folders come along, and PyPI's `kernels` is left alone.

Each way of installing gets an environment of its own that borrows this one's packages (PyTorch is
too large to install again) and holds a stand-in for the PyPI package `kernels`.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import liger_fx

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = "__version__ = '0.0.1'\nORIGIN = 'the PyPI package kernels'\n"
PROBE = """
import importlib.util, json, pathlib, pkgutil
import kernels, liger_fx.kernels.rms_norm, liger_fx.passes
page = pathlib.Path(liger_fx.__file__).parent / "report" / "page"
print(json.dumps({
    "kernels": kernels.ORIGIN,
    "passes": importlib.util.find_spec("passes"),
    "file": liger_fx.kernels.rms_norm.__file__,
    "page": sorted(path.suffix for path in page.iterdir()),
    "rules": sorted(module.name for module in pkgutil.iter_modules(liger_fx.passes.__path__)),
}))
"""


def run(*command: object, cwd: Path) -> str:
    # PYTHONPATH may name the checkout, and an installed copy is what is asked for
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment with the stand-in installed."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths("venv", {"base": str(home), "platbase": str(home)})
    site = Path(paths["purelib"])
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(STAND_IN)
    # Python reads .pth lines in order, after the environment's own folder, which so wins.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Path(paths["scripts"]) / "python"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The project as a clone has it: links as links, nothing that git ignores."""
    listed = run("git", "ls-files", "-zco", "--exclude-standard", cwd=ROOT).split("\0")
    target = tmp_path / "source"
    for name in filter(None, listed):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            path.write_bytes((ROOT / name).read_bytes())
    return target


def install(python: Path, *what: object) -> None:
    # --ignore-installed: the borrowed packages may hold this project already
    flags = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet")
    run(python, "-m", "pip", "install", *flags, *what, cwd=python.parent)


def check(python: Path, home: Path) -> None:
    """The installed project works from elsewhere, and all of it lies below `home`."""
    found = json.loads(run(python, "-c", PROBE, cwd=python.parent))
    assert found["kernels"] == "the PyPI package kernels"
    assert found["passes"] is None
    assert found["page"] == [".css", ".html", ".js"]
    assert Path(found["file"]).resolve().is_relative_to(home.resolve())
    assert found["rules"] == sorted(path.stem for path in (ROOT / "passes").glob("*.py"))
    for command in ((python.parent / "liger-fx",), (python, "-m", "liger_fx")):
        assert "rms_norm" in run(*command, "rules", cwd=python.parent)


def test_regular(python: Path, source: Path) -> None:
    install(python, source)
    check(python, python.parent.parent)


@pytest.mark.slow
def test_editable(python: Path, source: Path) -> None:
    install(python, "--editable", source)
    check(python, source)


@pytest.mark.slow
def test_wheel_from_sdist(python: Path, source: Path, tmp_path: Path) -> None:
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (project,) = unpacked.iterdir()
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    run(sys.executable, "-c", build, cwd=project)
    (wheel,) = unpacked.glob("*.whl")
    assert wheel.name.startswith(f"liger_fx-{liger_fx.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"liger_fx"}
    install(python, wheel)
    check(python, python.parent.parent)


def test_one_version_is_named_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    assert f"## {liger_fx.__version__}" in (ROOT / "CHANGELOG.md").read_text()
