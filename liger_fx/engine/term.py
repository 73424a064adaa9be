"""One value of the graph, named by what it computes and not by how it was spelled.

    x.pow(2)   torch.pow(x, 2)   x * x   x.square()   ->   square(x)
    a / torch.sqrt(v)   a * v.rsqrt()                 ->   mul(a, rsqrt(v))
    v.to(torch.float32)   v.float()   v.type_as(w)    ->   cast(v), between floating types
    q.chunk(2, -1)[1]   q[..., 8:]                    ->   slice(q, start=8, stop=16, step=1)

Dimensions are counted from the end: the last one is -1 whatever the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from liger_fx.tracing.trace import TensorSpec

FLOATS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}


class Term:
    """An operator, its operands (terms, looked up when first asked for) and its attributes.

    op: the canonical operator, "constant" for a number, "opaque" for what has no name here.
    node: the graph node that computes the value; None for a number, and for a value that the graph
        holds only as a part of others (see slices.py).
    hidden: further nodes that were read to name the operator (the sqrt below a reciprocal).
    spec: shape, dtype and device of the value, None where it is no tensor.
    """

    __slots__ = (
        "op",
        "node",
        "hidden",
        "attributes",
        "spec",
        "_arguments",
        "_resolve",
        "_operands",
    )

    def __init__(
        self,
        op: str,
        arguments: tuple[Any, ...] = (),
        *,
        node: fx.Node | None = None,
        hidden: tuple[fx.Node, ...] = (),
        attributes: dict[str, Any] | None = None,
        spec: TensorSpec | None = None,
        resolve: Callable[[Any], Term] | None = None,
    ) -> None:
        self.op, self.node, self.hidden, self.spec = op, node, hidden, spec
        self.attributes = attributes or {}
        self._arguments, self._resolve = arguments, resolve
        self._operands: tuple[Term, ...] | None = None

    @property
    def operands(self) -> tuple[Term, ...]:
        """The terms this one is computed from."""
        if self._operands is None:
            lookup = self._resolve
            self._operands = tuple(
                [a if isinstance(a, Term) else lookup(a) for a in self._arguments] if lookup else ()
            )
        return self._operands

    @property
    def arity(self) -> int:
        """The number of operands."""
        return len(self._arguments)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All graph nodes this term stands for, without those of its operands."""
        return self.hidden if self.node is None else (self.node, *self.hidden)

    @property
    def width(self) -> int | None:
        """The size of the last dimension, None where the trace left it open or there is none."""
        last = self.spec.shape[-1] if self.spec and self.spec.shape else None
        return last if isinstance(last, int) else None

    @property
    def number(self) -> Any:
        """The value of a constant."""
        return self.attributes["value"]

    def __str__(self) -> str:
        if self.op == "constant":
            return repr(self.number)
        return describe(self.node) if self.node is not None else self.op

    __repr__ = __str__


def constant(value: Any) -> Term:
    """The term of a Python number."""
    return Term("constant", attributes={"value": value})


def is_transparent(term: Term) -> bool:
    """Whether a pattern looks through the term: an alias, or a cast between floating types."""
    return term.op in ("cast", "alias")


def bare(term: Term) -> Term:
    """What a pattern sees of a term: the value before any alias and any such cast."""
    while is_transparent(term):
        term = term.operands[0]
    return term


def loses_nothing(cast: Term) -> bool:
    """Whether every value survives a cast between floats: float16 to bfloat16 loses some."""
    source, target = cast.operands[0].spec, cast.spec
    if source is None or target is None:
        return False
    return source.dtype == target.dtype or FLOATS[source.dtype] < FLOATS[target.dtype]


def describe(node: fx.Node, names: Mapping[fx.Node, str] = MappingProxyType({})) -> str:
    """A node as one short text, ``mul(weight, to_4)``; ``names`` are given to its inputs."""
    target = target_name(node)
    if node.op in ("placeholder", "get_attr", "output"):
        return _brief(node, names)
    if node.op == "call_module":
        target = _last_part(target)
    if target == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        places = ", ".join(_brief(item, names) for item in index)
        return f"{_brief(node.args[0], names)}[{places}]"
    arguments = ", ".join(_brief(a, names) for a in (*node.args, *node.kwargs.values()))
    return f"{target}({arguments})"


def target_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls; its target, for what calls neither."""
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target))


def _brief(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        if argument in names:
            return names[argument]
        is_path = argument.op in ("get_attr", "call_module")
        return _last_part(argument.target) if is_path else argument.name
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_brief(a, names) for a in argument)}]"
    if isinstance(argument, slice):
        parts = [argument.start, argument.stop] + ([argument.step] if argument.step else [])
        return ":".join("" if p is None else _brief(p, names) for p in parts)
    return "..." if argument is Ellipsis else str(argument).removeprefix("torch.")


def _last_part(path: Any) -> str:
    return str(path).rpartition(".")[2]
