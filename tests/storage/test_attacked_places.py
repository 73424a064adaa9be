"""Files that are no files, and directories of others where a graph is to be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import liger_fx
from liger_fx.errors import SaveError
from liger_fx.model.block import Block
from liger_fx.source.folder import MODULE_MARK
from tests.storage.files import contents
from tests.storage.hostile import refused

FILES = [
    "config.json", "generation_config.json", "model.safetensors", "buffers.safetensors",
    "report.json",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file(name: str, kind: str, saved: Path) -> None:
    (saved / name).unlink()
    if kind == "pipe":
        os.mkfifo(saved / name)
    elif kind == "directory":
        (saved / name).mkdir()
    else:
        (saved / name).symlink_to("/dev/zero")
    refused(saved, f"{name}: cannot be read: is no regular file")


def test_a_pipe_as_the_graph_or_the_index(saved: Path) -> None:
    os.mkfifo(saved / "model.safetensors.index.json")
    refused(saved, "model.safetensors.index.json: cannot be read: is no regular file")
    (saved / "graph.json").unlink()
    os.mkfifo(saved / "graph.json")
    refused(saved, str(saved))


def write(files: dict[str, str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return apply


def linked(folder: Path) -> None:
    write({"graph.json": '{"format": "liger_fx graph"}', "../mine/config.json": "{}"})(folder)
    (folder / "config.json").symlink_to(folder.parent / "mine" / "config.json")


OWN = '{"format": "liger_fx graph", "schema": 1}'
SOURCE = f"{MODULE_MARK} 0.1.0.\n"
GRAPHS: dict[str, Callable[[Path], None]] = {
    "another graph": write({"graph.json": '{"nodes": [1, 2]}', "config.json": "{}"}),
    "the words elsewhere": write({"graph.json": '{"x": {"format": "liger_fx graph"}}'}),
    "a list": write({"graph.json": '["format", "liger_fx graph"]'}),
    "no JSON": write({"graph.json": "precious"}),
    "a directory": write({"graph.json/precious": "mine"}),
    "a report that is a directory": write({"graph.json": OWN, "report.json/precious": "mine"}),
    "a cache": write({"graph.json": OWN, "__pycache__/precious": "mine"}),
    "a package": write({"graph.json": OWN, "__init__.py": "mine", "module.py": SOURCE}),
    "a link": linked,
    "weights alone": write({"model.safetensors": "mine"}),
}
PACKAGES: dict[str, Callable[[Path], None]] = {
    "a package": write({"__init__.py": "from .module import f\n", "module.py": "def f(): ...\n"}),
    "an __init__ of one's own": write({"__init__.py": "import os\n", "module.py": SOURCE}),
    "a module that is a directory": write({"module.py/precious": "mine"}),
    "a cache of others": write({"module.py": SOURCE, "__pycache__/precious.txt": "mine"}),
    "a cache of other code": write({"module.py": SOURCE, "__pycache__/mine.cpython-311.pyc": ""}),
    "a directory in the cache": write({"module.py": SOURCE, "__pycache__/module.x.pyc/mine": ""}),
    "a cache that is a file": write({"module.py": SOURCE, "__pycache__": "mine"}),
    "the words further down": write({"module.py": f"\n{SOURCE}"}),
    "a saved graph": write({"graph.json": OWN, "module.py": SOURCE}),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_save_replaces_nothing_of_others(kind: str, llama: Block, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    GRAPHS[kind](tmp_path / "there")
    before = contents(tmp_path)
    with pytest.raises(SaveError, match="holds something else"):
        liger_fx.save(llama, tmp_path / "there")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", PACKAGES)
def test_to_folder_replaces_nothing_of_others(kind: str, llama: Block, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    PACKAGES[kind](tmp_path / "there")
    before = contents(tmp_path)
    with pytest.raises(SaveError, match="holds something else"):
        liger_fx.to_folder(llama, tmp_path / "there")
    assert contents(tmp_path) == before


def test_what_was_written_before_is_replaced(llama: Block, saved: Path, tmp_path: Path) -> None:
    for text in ('{"format": "liger_fx graph", damaged', '{"a": 1, "format": "liger_fx graph"}'):
        (saved / "graph.json").write_text(text)
        liger_fx.save(llama, saved)
        assert contents(saved)["graph.json"] != text.encode()
    liger_fx.to_folder(llama, tmp_path / "package")
    before = contents(tmp_path / "package")
    write({"__pycache__/module.cpython-311.pyc": ""})(tmp_path / "package")
    liger_fx.to_folder(llama, tmp_path / "package")
    assert contents(tmp_path / "package") == before
