"""What a spelling may ask of the reader of a graph: the terms of its arguments, and a new term.

view.operand(node)            ->  the term of an argument
view.make("mul", (x, y), node)  ->  Term("mul", ...), with the node's shape and dtype
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import fx

from liger_fx.engine.term import Term, constant
from liger_fx.tracing.trace import TensorSpec

_OWN = ("opaque", "dropout")  # what equals itself alone


class View(ABC):
    """A reader of nodes as terms."""

    @abstractmethod
    def __call__(self, node: fx.Node) -> Term:
        """The term of a node."""

    def operand(self, value: Any) -> Term:
        """The term of an argument: a node, a number, or a term already."""
        if isinstance(value, fx.Node):
            return self(value)
        return value if isinstance(value, Term) else constant(value)

    def make(
        self,
        op: str,
        arguments: tuple[Any, ...],
        node: fx.Node | None = None,
        hidden: tuple[fx.Node, ...] = (),
        spec: TensorSpec | None = None,
        **attributes: Any,
    ) -> Term:
        """A term of this view; its spec is the node's unless one is given."""
        if node is not None:
            spec = node.meta.get("spec")
        return Term(
            op, arguments, node=node, hidden=hidden, attributes=attributes, spec=spec,
            resolve=self.operand,
        )  # fmt: skip

    @abstractmethod
    def changes_between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node between the two, in the graph's order, changes a tensor, a cache or a
        mode."""

    def same(self, a: Term, b: Term, depth: int = 8) -> bool:
        """Whether two terms are the same value: one node, or the same operator on the same values
        with nothing changed in between.

        Looks ``depth`` operators deep, and answers no below that. What is opaque, drawn at random
        or a module's result equals only itself.
        """
        if a is b or (a.node is not None and a.node is b.node):
            return True
        if a.op != b.op or a.spec != b.spec or a.attributes != b.attributes or depth == 0:
            return False
        if any(term.op in _OWN or (term.node and term.node.op == "call_module") for term in (a, b)):
            return False
        if a.arity != b.arity or (a.arity == 0 and a.op not in ("constant", "get_attr")):
            return False
        pairs = zip(a.operands, b.operands, strict=True)
        return all(self.same(x, y, depth - 1) for x, y in pairs) and not self._changed(a, b)

    def _changed(self, a: Term, b: Term) -> bool:
        if a.node is None or b.node is None:
            return False
        first, last = sorted((a.node, b.node))
        return self.changes_between(first, last)

    @staticmethod
    def spec(value: Any) -> TensorSpec | None:
        """What the trace recorded of a node's tensor."""
        return value.meta.get("spec") if isinstance(value, fx.Node) else None

    @staticmethod
    def rank(value: Any) -> int | None:
        """The number of dimensions of a node's tensor."""
        spec = View.spec(value)
        return None if spec is None else len(spec.shape)
