"""What may be replaced: directories that hold nothing but an earlier save, told by its contents.

graph.json {"format": "liger_fx graph", ...}, config.json     ->  replaced
graph.json {"nodes": [...]}, config.json                      ->  SaveError, all is left as it is
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from liger_fx.errors import LoadError, SaveError, printable
from liger_fx.storage.json_file import parse
from liger_fx.storage.names import FORMAT, GRAPH, MODULE, MODULE_MARK
from liger_fx.storage.opening import read_file

PACKAGE = "__init__.py"
_CACHE = "__pycache__"
_SHARED = (
    r"config\.json|generation_config\.json|buffers\.safetensors"
    r"|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
)
OWN_FILES: Mapping[str, re.Pattern[str]] = {
    GRAPH: re.compile(rf"graph\.json|report(-\d+)?\.json|{_SHARED}"),
    MODULE: re.compile(rf"module\.py|__init__\.py|{_SHARED}"),
}
_CACHED = re.compile(r"(module|__init__)\.[\w.-]+\.pyc")
_IMPORTS = re.compile(rb"from \.module import \w+, load\s*")


def check_replaceable(path: Path, mark: str) -> None:
    """SaveError unless there is nothing at ``path``, or a directory with what was written before:
    regular files of the names that go with ``mark``, GRAPH or MODULE, and ``mark`` is our own."""
    if not path.exists():
        return
    if not path.is_dir():
        raise SaveError(f"{path} is a file; a graph is saved as a directory.")
    try:
        foreign = _foreign(path, mark)
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror or error}.") from error
    if foreign is not None:
        what = printable(foreign, 80)
        raise SaveError(f"{path} holds something else ({what}): give a new directory.")


def _foreign(path: Path, mark: str) -> str | None:
    """The name of an entry that no save has written; None if there is none."""
    entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    for entry in entries:
        if mark == MODULE and entry.name == _CACHE:
            if not entry.is_dir(follow_symlinks=False) or not _is_python_cache(entry.path):
                return entry.name
        elif not OWN_FILES[mark].fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            return entry.name
    names = {entry.name for entry in entries}
    if names and mark not in names:
        return entries[0].name
    if mark == GRAPH:
        return GRAPH if names and not _is_graph(path / GRAPH) else None
    if names and not _first_bytes(path / MODULE).startswith(MODULE_MARK.encode()):
        return MODULE
    if PACKAGE in names and not _IMPORTS.fullmatch(_first_bytes(path / PACKAGE)):
        return PACKAGE
    return None


def _is_python_cache(folder: str) -> bool:
    return all(
        entry.is_file(follow_symlinks=False) and _CACHED.fullmatch(entry.name)
        for entry in os.scandir(folder)
    )


def _is_graph(file: Path) -> bool:
    """Whether it says that it is a saved graph; one that is damaged further on still is."""
    start = _first_bytes(file)
    if re.match(rb'\s*\{\s*"format"\s*:\s*"%b"' % FORMAT.encode(), start):
        return True
    try:
        whole = parse(read_file(file))
    except LoadError:
        return False
    return isinstance(whole, dict) and whole.get("format") == FORMAT


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)
