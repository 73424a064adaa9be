"""Directories that a save has not finished: one in the making is locked, one left by a crash goes.

.graph.3f9c21aa.new    locked by its process       ->  left alone
.graph.77e0b1d4.new    of a process that was killed, older than an hour  ->  removed
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ABANDONED = 3600  # seconds


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Others can tell that the directory is being written to, also when this process dies."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove_abandoned(path: Path, own: re.Pattern[str]) -> None:
    """Remove what crashed saves to ``path`` left: of ``own`` files, old enough, held by nobody."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.new")
    if fcntl is None:
        return
    for left in path.parent.iterdir():
        if not name.fullmatch(left.name) or left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError):
            files = list(left.iterdir())
            written = max(file.lstat().st_mtime for file in (left, *files))
            is_old = written < time.time() - _ABANDONED
            if is_old and all(own.fullmatch(file.name) for file in files) and not _is_held(left):
                shutil.rmtree(left, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
