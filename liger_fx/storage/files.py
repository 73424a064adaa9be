"""The files of a saved graph: their names, opening them, and knowing an earlier save again.

model.safetensors made by mkfifo     ->   LoadError, at once; opening it would wait for a writer
a save to the directory that is read ->   LoadError: half of one graph and half of another
graph.json {"nodes": [...]}          ->   no graph of ours: a save does not replace it
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liger_fx.errors import LoadError
from liger_fx.storage.directory import Kind, first_bytes, is_file
from liger_fx.storage.json_file import parse

GRAPH = "graph.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
REPORT = "report.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
BUFFERS = "buffers.safetensors"
CHECKSUMS = "checksums.json"
# The field of GRAPH that says what it is.
FORMAT = "liger_fx graph"
# Patterns of the files that any transformers checkpoint may have, and of BUFFERS.
_WEIGHT_FILES = r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
WEIGHT_FILES = re.compile(_WEIGHT_FILES)
MODEL_FILES = rf"config\.json|generation_config\.json|buffers\.safetensors|{_WEIGHT_FILES}"
# Without O_NONBLOCK, opening a pipe waits; without O_NOCTTY, a terminal would be taken.
_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_CLOEXEC"):
    _FLAGS |= getattr(os, _name, 0)
# Nothing that is read as a whole is larger.
_MOST_BYTES = 2**28


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file, to be read unbuffered; LoadError if it cannot be, or is none (a pipe, a device).

    What was opened is looked at, not what is at the path before or after.
    """
    try:
        handle = os.open(file, _FLAGS)
    except (OSError, ValueError) as error:  # ValueError for a null byte
        raise _unreadable(error) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise LoadError("cannot be read: is no regular file")
        with io.FileIO(handle, closefd=False) as found:
            yield found
    except OSError as error:
        raise _unreadable(error) from None
    finally:
        os.close(handle)


def read_file(file: Path) -> bytes:
    """The bytes of a file, the first of them where it is far larger than any of ours."""
    with opened(file) as found:
        parts = []
        left = _MOST_BYTES + 1
        while left > 0 and (part := found.read(min(left, 2**20))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _unreadable(error: Exception) -> LoadError:
    return LoadError(f"cannot be read: {getattr(error, 'strerror', None) or error}")


@contextmanager
def unreplaced(path: Path) -> Iterator[None]:
    """LoadError if another directory takes the place of ``path`` during the block: what was read
    would be half of one and half of the other."""
    if sys.platform == "win32" or not path.is_dir():
        yield
        return
    handle = os.open(path, os.O_RDONLY)  # while it is open, no other gets its number
    replaced = LoadError("was replaced while it was read: load it again", str(path))
    try:
        yield
        if not _is_at(handle, path):
            raise replaced
    except LoadError:
        if not _is_at(handle, path):
            raise replaced from None
        raise
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _is_graph(file: Path) -> bool:
    """Whether it says that it is a saved graph; one that is damaged further on still is."""
    if not is_file(file):
        return False
    if re.match(rb'\s*\{\s*"format"\s*:\s*"%b"' % FORMAT.encode(), first_bytes(file)):
        return True
    try:
        whole = parse(read_file(file))
    except LoadError:
        return False
    return isinstance(whole, dict) and whole.get("format") == FORMAT


SAVED_GRAPH = Kind(
    GRAPH,
    {r"graph\.json": _is_graph, rf"report(-\d+)?\.json|checksums\.json|{MODEL_FILES}": is_file},
)
