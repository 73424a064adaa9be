"""What a trace is: one flat graph, and the facts about each of its nodes that torch.fx does not
keep.

    model(input_ids)  ->  Trace(graph, root, calls, guards, opaque)

Every node of the graph carries in ``node.meta``

    "spec"    TensorSpec of its result, when that is one tensor
    "call"    index into ``Trace.calls`` of the module call whose code made the node
    "module"  the path of that module, "" for the model itself
    "source"  (file, line) of the model's code that made the node
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch
from torch import fx

if TYPE_CHECKING:
    from liger_fx.tracing.guards import Guards

Source = tuple[str, int]


class TensorSpec(NamedTuple):
    """A tensor's metadata: sizes are ints where the trace fixed them, else expressions of the
    inputs' sizes."""

    shape: tuple[int | sympy.Expr, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.shape))
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


@dataclass
class ModuleCall:
    """One call of a module that was traced through; leaves are call_module nodes instead.

    ``args``, ``kwargs`` and ``output`` are fx argument trees: nodes stand where the tensors stood.
    ``asks`` is what its code asked about, of which another call may have another answer.
    """

    index: int
    path: str
    cls: type
    parent: int | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    asks: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class OpaqueLeaf:
    """A module whose code the trace could not follow: the graph calls it as it is."""

    path: str
    class_name: str
    reason: str
    source: Source | None = None

    def __str__(self) -> str:
        where = f" ({self.source[0]}:{self.source[1]})" if self.source else ""
        return f"{self.path}: {self.class_name} stays a module that is called, {self.reason}{where}"


@dataclass(frozen=True)
class ResultTensor:
    """A tensor that a block returns; sizes and strides may be expressions of the call's sizes."""

    spec: TensorSpec
    strides: tuple[int | sympy.Expr, ...]


@dataclass(frozen=True)
class ResultSize:
    """A number that a block returns, as an expression of the call's sizes."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Result:
    """What a block returns: a tree of tuples, lists and mappings of tensors, plain values, sizes
    and opaque objects; ``names`` are those of the sizes in it, as the call has them. ``assumes``
    are the facts about sizes that decide what it is made of. ``changes`` are places outside the
    modules that its code changes."""

    tree: Any
    names: dict[sympy.Symbol, str]
    assumes: tuple[sympy.Basic, ...] = ()
    changes: frozenset[tuple[int, str]] = frozenset()


@dataclass
class Trace:
    """The graph of one block for one kind of call; the graph's targets are paths below ``root``.

    read: the attributes that the code read, by the path of the module.
    """

    graph: fx.Graph
    root: torch.nn.Module
    calls: list[ModuleCall]
    guards: Guards
    opaque: list[OpaqueLeaf]
    result: Result
    read: dict[str, tuple[str, ...]]
