"""Which tensors a saved graph has, where they lie, and how they get into a tree.

    tensors: [{"path": "model.embed_tokens.weight", "kind": "parameter", "dtype": "float32", ...},
              {"path": "lm_head.weight", ..., "same_as": "model.embed_tokens.weight"}]

A checkpoint's tensors are in model.safetensors, or in shards that an index lists, under the names
that transformers gives them; the rest (rotary frequencies, constants) is in buffers.safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import nn

from liger_fx.codec import inside
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage.records import TensorKind, TensorRecord

SHARD_BYTES = 5 * 10**9
PARAMETER: Final = "parameter"
BUFFER: Final = "buffer"
CONSTANT: Final = "constant"
ATTRIBUTE: Final = "attribute"
# In a checkpoint are parameters and persistent buffers, the rest belongs to the model's code.
IN_CHECKPOINT = (PARAMETER, BUFFER)


@dataclass(frozen=True)
class Slot:
    """A place of the tree where a tensor is: ``group[name]``, where ``path`` leads."""

    path: str
    kind: TensorKind
    group: dict[str, Any]
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        found: torch.Tensor = self.group[self.name]
        return found


def slots(root: nn.Module) -> Iterator[Slot]:
    """Every place of a tensor, tied ones each: parameters, buffers, tensors that are attributes."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        passing = module._non_persistent_buffers_set
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield Slot(prefix + name, PARAMETER, module._parameters, name)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind: TensorKind = CONSTANT if name in passing else BUFFER
                yield Slot(prefix + name, kind, module._buffers, name)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield Slot(prefix + name, ATTRIBUTE, vars(module), name)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a saved tree, and all paths at which it is, with their kinds."""

    places: dict[str, TensorKind]
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


def records(tensors: Iterable[Tensor]) -> Iterator[TensorRecord]:
    """What graph.json says of them: a tied tensor is described at its first place."""
    for tensor in tensors:
        (first, kind), *others = tensor.places.items()
        yield TensorRecord(first, kind, tensor.dtype, list(tensor.shape), tensor.frozen)
        for path, kind in others:
            yield TensorRecord(path, kind, same_as=first)


def from_records(records: list[TensorRecord]) -> list[Tensor]:
    """The tensors that these describe; LoadError, naming the field, if one is none."""
    found: dict[str, Tensor] = {}
    for i, record in enumerate(records):
        with inside(f"tensors[{i}]"):
            if record.same_as is not None:
                if record.shape is not None or record.same_as not in found:
                    raise LoadError("names no tensor before it", "same_as")
                found[record.same_as].places[record.path] = record.kind
                continue
            if record.dtype is None or record.shape is None:
                raise LoadError("is missing", "dtype" if record.dtype is None else "shape")
            places: dict[str, TensorKind] = {record.path: record.kind}
            found[record.path] = Tensor(places, record.dtype, tuple(record.shape), record.frozen)
    return list(found.values())


def shards(tensors: Mapping[str, torch.Tensor]) -> StateDictSplit:
    """Which tensors go into which file, as transformers would have it: one of at most SHARD_BYTES,
    or several and an index."""
    return split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """How much memory the tensors take."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
