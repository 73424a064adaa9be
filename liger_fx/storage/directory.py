"""A directory that is written as a whole or not at all.

with replacing(path) as new:          .graph.3f9c.new/  beside path
    write_file(new / "graph.json")
                                      path is the new directory, the old one is gone;
                                      after an error, path is what it was
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from liger_fx.errors import SaveError
from liger_fx.storage.names import GRAPH
from liger_fx.storage.own_files import OWN_FILES, check_replaceable
from liger_fx.storage.unfinished import held, remove_abandoned

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: Path, mark: str = GRAPH) -> Iterator[Path]:
    """A new directory to write into, which takes the place of ``path`` when all went well.

    SaveError where something else than an earlier save (known by its file ``mark``) is at ``path``,
    and for a write that fails: the disk is full, say. The old files are whole then.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path, mark)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path, OWN_FILES[mark])
        new = path.parent / f".{path.name}.{secrets.token_hex(4)}.new"
        mode = _make_like(new, path)
    except OSError as error:
        raise SaveError(f"{path} cannot be made: {error.strerror}.") from error
    try:
        with held(new):
            yield new
            _sync(new)
        if mode is not None:
            new.chmod(mode)
        _put_in_place(new, path)
    except OSError as error:
        raise SaveError(
            f"{path} could not be written ({error.strerror or error}); nothing there has changed."
        ) from error
    finally:
        # the unfinished one after an error, else what stood at path before
        shutil.rmtree(new, ignore_errors=True)


def _make_like(new: Path, path: Path) -> int | None:
    """Make ``new`` with the owner and group of ``path``; returns the mode it is to have in the end,
    None where there is nothing at ``path``: then the process's own habits decide."""
    if not path.exists():
        new.mkdir()
        return None
    old = path.stat()
    new.mkdir(mode=0o700)
    mode = stat.S_IMODE(old.st_mode)
    made = new.stat()
    if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(new, old.st_uid, old.st_gid)
        except OSError:  # what its group might do is not for another group
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)
    new.chmod(mode | stat.S_IRWXU)
    return mode


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file, and wait until it is on the disk."""
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    if sys.platform == "win32":
        return  # directories cannot be opened there
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        old = new.with_suffix(".old")
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return done == 0
