"""Which tensors a saved graph has, where they lie, and how they get into a tree.

    tensors: [{"path": "model.embed_tokens.weight", "kind": "parameter", "dtype": "float32", ...},
              {"path": "lm_head.weight", ..., "same_as": "model.embed_tokens.weight"}]

A checkpoint's tensors are in model.safetensors, or in shards that an index lists, under the names
that transformers gives them; the rest (rotary frequencies, constants) is in buffers.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liger_fx.errors import LoadError, SaveError
from liger_fx.storage.checks import FLAG, LIST, OBJECT, STRING, expect, fields, inside, module_path
from liger_fx.storage.directory import INDEX, WEIGHTS
from liger_fx.storage.json_file import dump, parse, shown
from liger_fx.storage.tensors import Entry, read_header, read_tensor
from liger_fx.storage.tree import (
    ATTRIBUTE,
    BUFFER,
    CONSTANT,
    IN_CHECKPOINT,
    PARAMETER,
    Slot,
    slots,
)
from liger_fx.storage.values import dtype_name, read_dtype

SHARD_BYTES = 5 * 10**9
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}\.safetensors", re.ASCII)
_RECORD = {"path": STRING, "kind": STRING}
_OWN = {"dtype": STRING, "shape": LIST, "frozen": FLAG}
_TIED = {"same_as": STRING}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a saved tree, and all paths at which it is, with their kinds."""

    places: dict[str, str]
    dtype: torch.dtype
    shape: tuple[int, ...]
    frozen: bool

    @property
    def path(self) -> str:
        """The first of its paths: its name in the files."""
        return next(iter(self.places))

    @property
    def in_checkpoint(self) -> bool:
        """Whether a checkpoint has it, or the model's code makes it."""
        return any(kind in IN_CHECKPOINT for kind in self.places.values())


def describe(root: nn.Module, wanted: Callable[[Slot], bool]) -> list[Tensor]:
    """The tensors of the tree at wanted places, tied ones once; SaveError for what is none.

    A tied tensor is named by its first place, a parameter's or buffer's before an attribute's.
    """
    by_tensor: dict[int, list[Slot]] = {}
    order = (PARAMETER, BUFFER, CONSTANT, ATTRIBUTE)
    for slot in sorted(filter(wanted, slots(root)), key=lambda slot: order.index(slot.kind)):
        by_tensor.setdefault(id(slot.tensor), []).append(slot)
    return [_describe(same) for same in by_tensor.values()]


def _describe(same: list[Slot]) -> Tensor:
    tensor = same[0].tensor
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        raise SaveError(f"{same[0].path} is a {type(tensor).__name__}, not a plain tensor.")
    frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    places = {slot.path: slot.kind for slot in same}
    return Tensor(places, tensor.dtype, tuple(tensor.shape), frozen)


def encode(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    """The records of graph.json."""
    records = []
    for tensor in tensors:
        own: dict[str, Any] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        if tensor.frozen:
            own["frozen"] = True
        for path, kind in tensor.places.items():
            records.append({"path": path, "kind": kind, **own})
            own = {"same_as": tensor.path}
    return records


def decode(records: list[Any]) -> list[Tensor]:
    """What ``encode`` wrote; LoadError, naming the field, if it is none."""
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    for i, record in enumerate(records):
        with inside(f"tensors[{i}]"):
            fields(record, _RECORD, {**_OWN, **_TIED})
            path, kind = module_path(record["path"], "path"), record["kind"]
            if path in seen:
                raise LoadError(f"{path} is described twice", "path")
            if kind not in (PARAMETER, BUFFER, CONSTANT, ATTRIBUTE):
                raise LoadError(f"{shown(kind)} is no kind of tensor", "kind")
            seen.add(path)
            if "same_as" in record:
                if len(record) != 3 or record["same_as"] not in found:
                    raise LoadError("names no tensor before it", "same_as")
                found[record["same_as"]].places[path] = kind
            else:
                found[path] = _read_own(record, path, kind)
    return list(found.values())


def _read_own(record: Any, path: str, kind: str) -> Tensor:
    for name in ("dtype", "shape"):
        if name not in record:
            raise LoadError("is missing", name)
    shape = record["shape"]
    if len(shape) > 16 or any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
        raise LoadError("is no list of at most 16 sizes", "shape")
    frozen = record.get("frozen", False)
    return Tensor({path: kind}, read_dtype(record["dtype"], "dtype"), tuple(shape), frozen)


def shards(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The files to write, by name: one, or several of at most SHARD_BYTES."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.itemsize
        if groups[-1] and size + bytes_ > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += bytes_
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def index_of(files: Mapping[str, Mapping[str, torch.Tensor]]) -> bytes:
    """model.safetensors.index.json: which shard has which tensor."""
    size = sum(t.numel() * t.itemsize for group in files.values() for t in group.values())
    places = {name: file for file, group in files.items() for name in group}
    return dump({"metadata": {"total_size": size}, "weight_map": places})


@dataclass(frozen=True)
class Stored:
    """The tensors of some safetensors files, by name: the file, and the place in it."""

    entries: dict[str, tuple[Path, Entry]]

    @classmethod
    def in_files(cls, files: Iterable[Path]) -> Stored:
        """Those of these files; LoadError, naming the file, for one that is damaged."""
        entries: dict[str, tuple[Path, Entry]] = {}
        for file in files:
            with inside(file.name):
                for name, entry in _header(file).items():
                    if name in entries:
                        raise LoadError("is in another file, too", shown(name))
                    entries[name] = (file, entry)
        return cls(entries)

    @classmethod
    def in_checkpoint(cls, folder: Path) -> Stored:
        """Those of a checkpoint's one file, or of the shards that its index names."""
        index = folder / INDEX
        if not index.exists():
            return cls.in_files([folder / WEIGHTS])
        with inside(INDEX):
            record = expect(parse(read_file(index)), OBJECT)
            places = expect(record.get("weight_map"), OBJECT, "weight_map")
            for name, file in places.items():
                if type(file) is not str or not _SHARD.fullmatch(file):
                    raise LoadError(f"{shown(file)} is no file name", f"weight_map.{shown(name)}")
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
            with path.open("rb", buffering=0) as file:
                for name in inside_it:
                    with inside(f"{path.name}.{shown(name)}"):
                        tensor = read_tensor(file, self.entries[name][1])
                    yield name, tensor

    def check(self, tensors: Iterable[Tensor], *, exact: bool) -> None:
        """LoadError unless every tensor is here in its shape, and, if ``exact``, in its dtype."""
        left = dict(self.entries)
        for tensor in tensors:
            names = [name for name in tensor.places if name in left]
            if not names:
                raise LoadError("the weights lack it", shown(tensor.path))
            _, entry = left[names[0]]
            if entry.shape != tensor.shape or (exact and entry.dtype != tensor.dtype):
                raise LoadError(
                    f"is {_kind(entry.dtype, entry.shape)} in the weights and "
                    f"{_kind(tensor.dtype, tensor.shape)} in the graph",
                    shown(tensor.path),
                )
            for name in names:
                del left[name]
        if left:
            raise LoadError("the graph has no such tensor, but the weights do", shown(min(left)))


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _header(file: Path) -> dict[str, Entry]:
    try:
        return read_header(file)
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror or error}") from None


def read_file(file: Path) -> bytes:
    """The bytes of a file; LoadError if it cannot be read or is far larger than it should be."""
    try:
        with file.open("rb") as opened:
            return opened.read(2**28 + 1)
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror or error}") from None


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """How much memory the tensors take."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
