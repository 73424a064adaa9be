"""graph.json as records: each class is an object of the file, with its fields and their types.

docs/graph-format.md describes what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from liger_fx.codec import absent, shown
from liger_fx.engine.edits import Rewrite
from liger_fx.engine.rule import Selection
from liger_fx.engine.site import Site
from liger_fx.errors import LoadError
from liger_fx.storage.checks import Name, PartOfPath, Path, RootPath, identifier

SCHEMA = 2
_MAX_PLANS, _MAX_NAMES = 16, 4096
# Names that the check of the inputs uses itself.
_RESERVED = {
    "min", "max", "abs", "round", "math", "floor", "ceil", "trunc", "arguments", "block", "take",
    "type", "len", "tuple",
}  # fmt: skip


def matching(pattern: str, what: str) -> Callable[[str], str]:
    """A check that a whole text has this pattern."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise LoadError(f"{shown(text)} is no {what}")
        return text

    return check


def below(limit: int, what: str) -> Callable[[int], int]:
    """A check that a number is one from 0 on, below the limit."""

    def check(number: int) -> int:
        if not 0 <= number < limit:
            raise LoadError(f"{shown(number)} is no {what}")
        return number

    return check


def size_name(name: str) -> str:
    """``name``, which stands for a number in the guards over sizes."""
    if identifier(name) in _RESERVED:
        raise LoadError(f"{shown(name)} is no name for a size")
    return name


def _input_size(size: int | str) -> int | str:
    return size_name(size) if isinstance(size, str) else below(2**63, "size")(size)


def _shape(shape: list[int]) -> list[int]:
    if len(shape) > 16:
        raise LoadError("is no list of at most 16 sizes")
    return shape


def _few_names(selection: Selection) -> Selection:
    if len(selection.excluded) + len(selection.chosen or ()) > _MAX_NAMES:
        raise LoadError(f"has more than {_MAX_NAMES} names")
    return selection


def _few_plans(plans: list[PlanRecord]) -> list[PlanRecord]:
    if len(plans) > _MAX_PLANS:
        raise LoadError(f"are {len(plans)}, more than {_MAX_PLANS}")
    return plans


InputSize = Annotated[int | str, _input_size]
Shape = Annotated[list[Annotated[int, below(2**48, "size")]], _shape]
ImplementationName = Annotated[str, matching("[a-z0-9_]{1,60}", "implementation")]
# The module that code is in, or the file where it is in none, and the line.
Source = tuple[
    Annotated[str, matching(r"[\w.<>/-]{1,300}", "module")], Annotated[int, below(10**7, "line")]
]
TensorKind = Literal["parameter", "buffer", "constant", "attribute"]
# Path, class, and the texts of attributes by their names.
Module = tuple[RootPath, str, dict[str, str]]


@dataclass(frozen=True)
class ModelRecord:
    """The model's class; no type of config where only a given model can be bound."""

    class_: str
    model_type: str | None


@dataclass(frozen=True)
class Fingerprint:
    """What the graphs were traced from: hashes of code, and the versions of packages."""

    code: dict[str, str]
    names: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Implementations:
    """What a config, or a part of one, leaves open: which code computes attention and experts."""

    attention: ImplementationName | None
    experts: ImplementationName | None


@dataclass(frozen=True)
class NamedModule:
    """A module of liger_fx: what it is made of, and of what it takes over."""

    path: Path
    class_: str
    options: dict[str, Any]
    parameters: list[PartOfPath]
    children: list[PartOfPath]
    also: list[Path] = absent([])


@dataclass(frozen=True)
class TensorRecord:
    """A place of a tensor: what it is, or the place of the same tensor before it."""

    path: Path
    kind: TensorKind
    dtype: torch.dtype | None = absent(None)
    shape: Shape | None = absent(None)
    frozen: bool = absent(False)
    same_as: str | None = absent(None)


@dataclass(frozen=True)
class InputRecord:
    """A tensor that a graph takes."""

    sizes: list[InputSize]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ReadRecord:
    """What the code asked of an object that is handed in, step by step, and found."""

    argument: Name
    steps: list[list[Any]]
    value: bool | int | str | None


@dataclass(frozen=True)
class GuardsRecord:
    """When a graph may serve a call; calls.py reads the arguments and the reads."""

    arguments: dict[Name, Any]
    hints: dict[str, int]
    loose: list[str]
    sizes: list[str]
    training: bool
    grad_enabled: bool | None
    autocast: dict[str, torch.dtype | None]
    attention_fixed: bool
    attributes: dict[Name, Path] = absent({})
    reads: list[ReadRecord] = absent([])
    numbers: dict[Name, ReadRecord] = absent({})
    other_mode: list[Path] = absent([])
    contiguous: bool = absent(False)
    plain: bool = absent(False)
    order: list[Name] = absent([])
    distinct: bool = absent(False)
    default_dtype: torch.dtype | None = absent(None)
    modes: dict[str, bool | int | str] = absent({})
    shapes: dict[Path, list[int]] = absent({})
    dtypes: dict[Path, torch.dtype] = absent({})
    trained: dict[Path, bool] = absent({})
    layouts: dict[Path, tuple[list[int], int] | None] = absent({})
    classes: dict[Path, Literal["Tensor", "Parameter", "Buffer"]] = absent({})


@dataclass(frozen=True)
class OpaqueRecord:
    """A module that the trace could not enter."""

    path: Path
    class_: str
    reason: str
    source: Source | None


@dataclass(frozen=True)
class NodeRecord:
    """One node of a graph."""

    name: Name
    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    target: str
    args: list[Any] = absent([])
    kwargs: dict[Name, Any] = absent({})
    spec: list[int | str] = absent([])
    device: torch.device | None = absent(None)
    module: RootPath = absent("")
    source: Source | None = absent(None)
    rewrite: Rewrite | None = absent(None)
    plan: int | None = absent(None)


@dataclass(frozen=True)
class PlanRecord:
    """A graph for one kind of call. The nodes are read as NodeRecords, one by one.

    read: the attributes that the code read, by module. sites: what the rules rewrote and refused.
    operators: how often each stood there before; None for a plain trace.
    """

    guards: GuardsRecord
    followed: list[RootPath]
    opaque: list[OpaqueRecord]
    nodes: list[Any]
    read: dict[RootPath, list[str]] = absent({})
    sites: list[Site] = absent([])
    operators: dict[str, int] | None = absent(None)


@dataclass(frozen=True)
class BlockRecord:
    """Alike blocks and their graphs; ``attributes`` are paths of the ints that each has for
    itself."""

    paths: list[RootPath]
    plans: Annotated[list[PlanRecord], _few_plans]
    attributes: list[Path] = absent([])


@dataclass(frozen=True)
class Document:
    """graph.json."""

    format: str
    schema: int
    model: ModelRecord
    fingerprint: Fingerprint
    device: torch.device
    training: bool
    other_modes: list[Path]
    weights: bool
    selection: Annotated[Selection, _few_names] | None
    implementations: dict[str, Implementations]
    modules: list[Module]
    named_modules: list[NamedModule]
    tensors: list[TensorRecord]
    blocks: list[BlockRecord]
