"""Files of a saved graph are opened here: regular files only, of one directory.

model.safetensors made by mkfifo     ->   LoadError, at once; opening it would wait for a writer
a save to the directory that is read ->   LoadError: half of one graph and half of another
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liger_fx.errors import LoadError

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
