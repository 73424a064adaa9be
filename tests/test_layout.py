"""The rooms: imports go one way, the links are live, and nothing shadows another package."""

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "liger_fx"

# What each room may import of liger_fx, itself aside; a room not named here is above all of these.
MAY_IMPORT = {
    "liger_fx.kernels": (),
    "liger_fx.modules": ("liger_fx.kernels",),
    "liger_fx.tracing": ("liger_fx.kernels", "liger_fx.errors"),
    "liger_fx.engine": ("liger_fx.modules", "liger_fx.tracing", "liger_fx.errors"),
    "liger_fx.passes": ("liger_fx.engine", "liger_fx.modules"),
    "liger_fx.report": ("liger_fx.engine", "liger_fx.codec", "liger_fx.errors", "liger_fx"),
    "liger_fx.model": (
        "liger_fx.kernels",
        "liger_fx.modules",
        "liger_fx.tracing",
        "liger_fx.engine",
        "liger_fx.report",
        "liger_fx.errors",
    ),
    "liger_fx.storage": (
        "liger_fx.modules",
        "liger_fx.tracing",
        "liger_fx.engine",
        "liger_fx.report",
        "liger_fx.model",
        "liger_fx.codec",
        "liger_fx.errors",
    ),
    "liger_fx.source": (
        "liger_fx.modules",
        "liger_fx.tracing",
        "liger_fx.report",
        "liger_fx.storage",
        "liger_fx.model",
        "liger_fx.codec",
        "liger_fx.errors",
    ),
}
# Other people's packages that a room must work without.
MAY_NOT_IMPORT = {
    "liger_fx.kernels": ("transformers",),
    "liger_fx.modules": ("transformers", "triton"),
    "liger_fx.engine": ("triton",),
    "liger_fx.passes": ("transformers", "triton"),
}


def files() -> list[Path]:
    # rglob does not follow links, so what is behind them is listed by its linked name
    linked = [path for link in ("kernels", "passes") for path in (PACKAGE / link).glob("*.py")]
    return sorted({*PACKAGE.rglob("*.py"), *linked})


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path, modules: Collection[str] = ()) -> set[str]:
    """Every module that a file imports, inside functions and for type checkers too; of names from
    a package those that are ``modules``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(modules)) or {str(node.module)}
    return found - {"liger_fx"} if modules else found


def inside(module: str, room: str) -> bool:
    return module == room or (room != "liger_fx" and module.startswith(room + "."))


def files_of(room: str) -> list[Path]:
    folder = ROOT.joinpath(*room.split("."))
    return [path for path in files() if path.is_relative_to(folder)]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    assert files_of(room), f"{room} has no files"
    for path in files_of(room):
        ours = {name for name in imports(path) if name.partition(".")[0] == "liger_fx"}
        allowed = (room, *MAY_IMPORT[room])
        wrong = {name for name in ours if not any(inside(name, room) for room in allowed)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_no_circle_of_files() -> None:
    """Not by imports inside functions and for type checkers either."""
    names = {path: module_name(path) for path in files()}
    known = set(names.values())
    above = {name: imports(path, known) & known - {name} for path, name in names.items()}
    while above:
        free = {name for name, needs in above.items() if not needs & above.keys()}
        assert free, f"these import each other: {sorted(above)}"
        above = {name: needs for name, needs in above.items() if name not in free}


@pytest.mark.parametrize("room", MAY_NOT_IMPORT)
def test_lower_rooms_do_without_other_packages(room: str) -> None:
    for path in files_of(room):
        wrong = {name.partition(".")[0] for name in imports(path)} & set(MAY_NOT_IMPORT[room])
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_links_are_live_and_no_top_level_package(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink() and link.resolve() == ROOT / name
    assert any(link.glob("*.py"))
    assert not list((ROOT / name).rglob("__init__.py"))


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import liger_fx", ("torch", "transformers", "triton")),
        ("import liger_fx.kernels.rms_norm", ("transformers", "liger_fx.api")),
        ("import liger_fx.modules.rms_norm", ("transformers", "liger_fx.api")),
        ("import liger_fx.cli", ("torch", "transformers")),
    ],
)
def test_importing_one_room_loads_no_room_above(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print(*{set(absent)!r} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
