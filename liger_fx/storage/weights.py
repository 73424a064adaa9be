"""Which tensors a saved graph has, where they lie, and how they get into a tree.

    tensors: [{"path": "model.embed_tokens.weight", "kind": "parameter", "dtype": "float32", ...},
              {"path": "lm_head.weight", ..., "same_as": "model.embed_tokens.weight"}]

A checkpoint's tensors are in model.safetensors, or in shards that an index lists, under the names
that transformers gives them; the rest (rotary frequencies, constants) is in buffers.safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_fx.errors import LoadError, SaveError
from liger_fx.storage.checks import FLAG, LIST, STRING, fields, inside, module_path
from liger_fx.storage.json_file import dump, shown
from liger_fx.storage.names import WEIGHTS
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
    """The files to write, by name: none for no tensors, one, or several of at most SHARD_BYTES."""
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
        return {WEIGHTS: groups[0]} if tensors else {}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def index_of(files: Mapping[str, Mapping[str, torch.Tensor]]) -> bytes:
    """model.safetensors.index.json: which shard has which tensor."""
    size = sum(t.numel() * t.itemsize for group in files.values() for t in group.values())
    places = {name: file for file, group in files.items() for name in group}
    return dump({"metadata": {"total_size": size}, "weight_map": places})


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """How much memory the tensors take."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
