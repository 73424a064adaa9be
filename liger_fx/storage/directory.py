"""A directory that is written as a whole or not at all.

with replacing(path, SAVED_GRAPH) as new:     .graph.3f9c21aa.new/  beside path, locked
    write_file(new / "graph.json", ...)
                                              path is the new directory, the old one is gone;
                                              after an error, path is what it was

Replaced is what an earlier save wrote, and nothing else. What a crashed save left is removed by a
later one to the same place: an hour old, and locked by no process.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_fx.errors import SaveError, printable

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_ABANDONED = 3600  # seconds


@dataclass(frozen=True)
class Kind:
    """What a save writes. ``mark``: the file that is always there. ``files``: patterns of names,
    each with the question whether such an entry is our own."""

    mark: str
    files: Mapping[str, Callable[[Path], bool]]

    def foreign(self, folder: Path) -> str | None:
        """The name of an entry that no save has written; None if there is none."""
        entries = sorted(folder.iterdir())
        for entry in entries:
            checks = [ours for name, ours in self.files.items() if re.fullmatch(name, entry.name)]
            if not checks or not checks[0](entry):
                return entry.name
        is_marked = not entries or folder / self.mark in entries
        return None if is_marked else entries[0].name

    def has_name(self, name: str) -> bool:
        """Whether a save may write a file of that name."""
        return any(re.fullmatch(pattern, name) for pattern in self.files)


def is_file(path: Path) -> bool:
    """Whether it is a regular file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def first_bytes(file: Path) -> bytes:
    """The beginning of a file that ``is_file``."""
    with file.open("rb") as opened:
        return opened.read(4096)


@contextmanager
def replacing(path: Path, kind: Kind) -> Iterator[Path]:
    """A new directory to write into, which takes the place of ``path`` when all went well.

    SaveError where something else than an earlier save of this kind is at ``path``, and for a write
    that fails: the disk is full, say. The old files are whole then.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path, kind)
        new = path.parent / f".{path.name}.{secrets.token_hex(4)}.new"
        mode = _make_like(new, path)
    except OSError as error:
        raise SaveError(f"{path} cannot be made: {error.strerror}.") from error
    try:
        with _held(new):
            yield new
            sync(new)
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


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_replaceable(path: Path, kind: Kind) -> None:
    """SaveError unless there is nothing at ``path``, or a directory that holds only our own."""
    if not path.exists():
        return
    if not path.is_dir():
        raise SaveError(f"{path} is a file; a graph is saved as a directory.")
    try:
        foreign = kind.foreign(path)
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror or error}.") from error
    if foreign is not None:
        what = printable(foreign, 80)
        raise SaveError(f"{path} holds something else ({what}): give a new directory.")


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


@contextmanager
def _held(folder: Path) -> Iterator[None]:
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


def _is_held(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _remove_abandoned(path: Path, kind: Kind) -> None:
    """Remove what crashed saves to ``path`` left: of our files, old enough, held by nobody."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.new")
    for left in path.parent.iterdir() if fcntl is not None else ():
        if not name.fullmatch(left.name) or left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError):
            files = list(left.iterdir())
            written = max(file.lstat().st_mtime for file in (left, *files))
            is_ours = all(kind.has_name(file.name) for file in files)
            if is_ours and written < time.time() - _ABANDONED and not _is_held(left):
                shutil.rmtree(left, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a directory, or a file, is on the disk."""
    if sys.platform == "win32":
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY)
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
    sync(path.parent)


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
