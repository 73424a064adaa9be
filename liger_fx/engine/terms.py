"""The view of a graph as terms: nothing is changed, each node is read when something asks for it.

terms = Terms(root)
terms(node)                      ->  Term("rsqrt", (Term("add", ...),))
terms.named(graph, {"rsqrt"})    ->  the nodes that compute an rsqrt, however it was spelled
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx, nn

from liger_fx.engine.layer_spellings import LAYERS, MODULE_OPS, lower_module
from liger_fx.engine.spellings import ARITHMETIC
from liger_fx.engine.term import FLOATS, Term
from liger_fx.engine.view import View
from liger_fx.engine.views import VIEWS
from liger_fx.tracing.effects import is_effectful
from liger_fx.tracing.walk import module_at

_LOWERINGS = {**ARITHMETIC, **LAYERS, **VIEWS}


class Terms(View):
    """Reads the nodes of one graph whose call_module targets are paths below ``root``.

    A view is of the graph as it was when the nodes were read: after a change, make a new one.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._terms: dict[fx.Node, Term] = {}

    def __call__(self, node: fx.Node) -> Term:
        """The term of a node; "opaque" for what has no canonical name."""
        term = self._terms.get(node)
        if term is None:
            term = self._terms[node] = self._lower(node)
        return term

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        module: nn.Module = module_at(self._root, path)
        return module

    def _lower(self, node: fx.Node) -> Term:
        lowered: Term | None = None
        if node.op == "call_module":
            lowered = lower_module(self, node, self.module(str(node.target)))
        elif node.op == "get_attr":
            lowered = self.make("get_attr", (), node, path=node.target)
        elif node.target in _LOWERINGS and node.op in ("call_function", "call_method"):
            lowered = _LOWERINGS[node.target][0](self, node)
        if lowered is None or not _is_of_floats(lowered):
            return self.make("opaque", (), node)
        return lowered

    def changes_between(self, first: fx.Node, last: fx.Node) -> bool:
        node = first.next
        while node is not last:
            if is_effectful(node, self._root):
                return True
            node = node.next
        return False

    def named(self, nodes: Iterable[fx.Node], ops: Iterable[str]) -> Iterator[fx.Node]:
        """The nodes whose term has one of these operators, in the graph's order."""
        wanted = set(ops)
        targets = {t for t, (_, gives) in _LOWERINGS.items() if wanted.intersection(gives)}
        modules = bool(wanted & MODULE_OPS)
        for node in nodes:
            if node.op == "call_module":
                readable = modules
            else:
                readable = node.op in ("call_function", "call_method") and node.target in targets
            if readable and self(node).op in wanted:
                yield node


def _is_of_floats(term: Term) -> bool:
    """Whether the rules' formulas hold for the value: not for integers, which wrap around and are
    rounded, nor for complex numbers, of which a square is no square of a size."""
    return term.spec is None or term.spec.dtype in FLOATS or term.op == "get_attr"
