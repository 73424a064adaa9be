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

    @staticmethod
    def spec(value: Any) -> TensorSpec | None:
        """What the trace recorded of a node's tensor."""
        return value.meta.get("spec") if isinstance(value, fx.Node) else None

    @staticmethod
    def rank(value: Any) -> int | None:
        """The number of dimensions of a node's tensor."""
        spec = View.spec(value)
        return None if spec is None else len(spec.shape)
