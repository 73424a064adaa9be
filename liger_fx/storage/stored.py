"""The safetensors files of a saved graph or of any checkpoint, looked into but not read yet.

model.safetensors, or model.safetensors.index.json and the shards it names   ->   Stored
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import torch

from liger_fx.codec import decode, expect, inside, shown
from liger_fx.errors import LoadError
from liger_fx.storage.files import GRAPH, INDEX, WEIGHTS, read_file
from liger_fx.storage.json_file import parse
from liger_fx.storage.records import matching
from liger_fx.storage.tensors import Entry, read_header, read_tensor
from liger_fx.storage.weights import Tensor

# transformers has checkpoints of mixtures of experts with a tensor for each expert, say
_OTHER_NAMES = (
    ". If the checkpoint is one that transformers converts as it reads it, under other names than "
    "the model has, read the model with from_pretrained and bind the graph to it: "
    "load(path, model=model)"
)
State = tuple[int, int, int, int]
_Shard = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}\.safetensors", "file name")]


@dataclass(frozen=True)
class Stored:
    """The tensors of some safetensors files, by name: the file, and the place in it.

    states: what each file was when it was looked into; it must be the same when it is read.
    """

    entries: dict[str, tuple[Path, Entry]]
    states: dict[Path, State]

    @classmethod
    def in_files(cls, files: Iterable[Path]) -> Stored:
        """Those of these files; LoadError, naming the file, for one that is damaged."""
        entries: dict[str, tuple[Path, Entry]] = {}
        states: dict[Path, State] = {}
        for file in files:
            with inside(file.name):
                states[file] = _state(file)
                for name, entry in read_header(file).items():
                    if name in entries:
                        raise LoadError("is in another file, too", shown(name))
                    entries[name] = (file, entry)
        return cls(entries, states)

    @classmethod
    def in_checkpoint(cls, folder: Path) -> Stored:
        """Those of a checkpoint's one file, or of the shards that its index names."""
        index = folder / INDEX
        if not index.exists():
            return cls.in_files([folder / WEIGHTS])
        with inside(INDEX):
            record = expect(parse(read_file(index)), dict)
            with inside("weight_map"):
                places: dict[str, str] = decode(dict[str, _Shard], record.get("weight_map"))
        stored = cls.in_files(folder / file for file in sorted(set(places.values())))
        for name, file in places.items():
            if name not in stored.entries or stored.entries[name][0].name != file:
                raise LoadError(f"{shown(name)} is not in {file}", INDEX)
        return stored

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of these names on the CPU, file by file, one at a time."""
        wanted = sorted(names, key=lambda n: (self.entries[n][0], self.entries[n][1].start))
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.entries[name][0], []).append(name)
        for path, inside_it in by_file.items():
            with _opened(path) as file:
                for name in inside_it:
                    with inside(f"{path.name}.{shown(name)}"):
                        tensor = read_tensor(file, self.entries[name][1])
                    with inside(path.name):
                        _check_state(self.states[path], file)
                    yield name, tensor

    def check(self, tensors: Iterable[Tensor], *, exact: bool) -> None:
        """LoadError unless every tensor is here in its shape, and, if ``exact``, in its dtype."""
        left = dict(self.entries)
        for tensor in tensors:
            names = [name for name in tensor.places if name in left]
            if not names:
                cause = "the weights lack it" if exact else f"the weights lack it{_OTHER_NAMES}"
                raise LoadError(cause, f"{GRAPH}.tensors.{shown(tensor.path)}")
            file, entry = left[names[0]]
            if entry.shape != tensor.shape or (exact and entry.dtype != tensor.dtype):
                raise LoadError(
                    f"is {_kind(entry.dtype, entry.shape)} in the weights and "
                    f"{_kind(tensor.dtype, tensor.shape)} in the graph",
                    f"{file.name}.{shown(names[0])}",
                )
            for name in names:
                del left[name]
        if left:
            name = min(left)
            place = f"{left[name][0].name}.{shown(name)}"
            raise LoadError("the graph has no such tensor, but the weights do", place)


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror or error}", path.name) from None


def _state(file: Path | BinaryIO) -> State:
    """Tells a file from another in its place, and from itself after it was written to."""
    try:
        now = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror or error}") from None
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns


def _check_state(then: State, file: BinaryIO) -> None:
    if _state(file) != then:
        raise LoadError("was written to while it was read: load it again")
