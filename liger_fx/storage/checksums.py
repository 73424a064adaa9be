"""What the files of a saved graph held when they were written.

    checksums.json  {"config.json": "5ce0…", "graph.json": "91af…", "model.safetensors": "d3b7…"}

A flipped bit is a LoadError that names the file. It is no signature: who changes a file on purpose
can change this one as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from liger_fx.codec import inside
from liger_fx.errors import LoadError
from liger_fx.storage.directory import write_file
from liger_fx.storage.files import CHECKSUMS, SAVED_GRAPH, WEIGHT_FILES, opened, read_file
from liger_fx.storage.json_file import dump, parse

LOAD_ANYWAY = "verify_checksums=False loads it as it is"
_PIECE = 2**22  # bytes


def write_checksums(folder: Path) -> None:
    """The SHA-256 of every file that is in the folder."""
    sums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
    write_file(folder / CHECKSUMS, dump(sums))


def check_checksums(folder: Path, weights: bool) -> bool:
    """Whether there are checksums; LoadError for a file of a saved graph that is not as it was
    written, is missing or is new. ``weights``: whether those of the model are looked at as well."""
    if not (folder / CHECKSUMS).exists():
        return False
    with inside(CHECKSUMS):
        sums = parse(read_file(folder / CHECKSUMS))
        if not isinstance(sums, dict) or not all(map(SAVED_GRAPH.has_name, sums)):
            raise LoadError("must map the names of a saved graph's files to their checksums")
    there = {file.name for file in folder.iterdir()} - {CHECKSUMS}
    for name in sorted(sums.keys() | filter(SAVED_GRAPH.has_name, there)):
        if weights or not WEIGHT_FILES.fullmatch(name):
            with inside(name):
                _check(folder / name, sums.get(name), name in there)
    return True


def _check(file: Path, recorded: str | None, is_there: bool) -> None:
    if recorded is None:
        wrong = "was not there when this was saved"
    elif not is_there:
        wrong = "was there when this was saved, and is missing"
    elif _checksum(file) != recorded:
        wrong = "is not what was written when this was saved"
    else:
        return
    raise LoadError(f"{wrong}; {LOAD_ANYWAY}")


def _checksum(file: Path) -> str:
    found = hashlib.sha256()
    with opened(file) as read:
        while piece := read.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
