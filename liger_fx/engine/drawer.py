"""Draws sites while their graph is rewritten: boxes with shapes and dtypes, and what they cost.

matches, plan   ->   Drawing(before: x, to, pow, ..., mul; after: x, LigerRMSNorm)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import sympy
from torch import fx

from liger_fx.engine.cost import Costs
from liger_fx.engine.drawing import Box, Drawing
from liger_fx.engine.facts import Facts
from liger_fx.engine.match import Match
from liger_fx.engine.rule import Replacement
from liger_fx.engine.search import Refusal
from liger_fx.engine.term import Term
from liger_fx.tracing.trace import TensorSpec, Trace

Shape = tuple[int | str, ...]


class Drawer:
    """Draws the sites of one trace; alike sites get one and the same Drawing.

    Make it before the graph is changed.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.costs = Costs(facts.trace.graph, facts.root)
        self.memory = self.costs.memory
        self._size_names = _size_names(facts.trace)
        self._shapes: dict[tuple[Any, ...], Shape] = {}
        self._drawings: dict[Drawing, Drawing] = {}

    def rewritten(
        self,
        group: Sequence[Match],
        replacement: Replacement,
        names: Mapping[fx.Node, str],
        takes_linear: bool,
    ) -> Drawing:
        """The matches' nodes, and the module that takes their place."""
        nodes = self._in_order(n for match in group for n in (*match.covered, match.root))
        results = {match.root for match in group}
        handed_out = {term.node for term in replacement.results if term.node is not None}
        return self._one_of_its_kind(
            Drawing(
                self._before(nodes, results, names),
                self._after(group, replacement, names),
                self.costs.before(nodes),
                self.costs.after(nodes, results, takes_linear, handed_out),
            )
        )

    def refused(self, refusal: Refusal) -> Drawing:
        """The nodes that fitted so far."""
        nodes = self._in_order((refusal.node, *refusal.covered))
        before = self._before(nodes, (), {})
        return self._one_of_its_kind(Drawing(before, cost_before=self.costs.before(nodes)))

    def _one_of_its_kind(self, drawing: Drawing) -> Drawing:
        return self._drawings.setdefault(drawing, drawing)

    def _in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(dict.fromkeys(nodes), key=self.facts.position.__getitem__)

    def _before(
        self, nodes: Sequence[fx.Node], results: Collection[fx.Node], names: Mapping[fx.Node, str]
    ) -> tuple[Box, ...]:
        boxes, places, inside = list[Box](), dict[fx.Node, int](), set(nodes)
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in places and _is_drawn(source):
                    places[source] = len(boxes)
                    boxes.append(self._outside(source, names))
            places[node] = len(boxes)
            read_outside = node in results or not inside.issuperset(node.users)
            reads = tuple(places[s] for s in node.all_input_nodes if s in places)
            boxes.append(self._operator(node, reads, read_outside))
        return tuple(boxes)

    def _after(
        self, group: Sequence[Match], replacement: Replacement, names: Mapping[fx.Node, str]
    ) -> tuple[Box, ...]:
        places: dict[Any, int] = {}
        boxes: list[Box] = []
        reads = tuple(self._input(term, names, boxes, places) for term in replacement.inputs)
        module = replacement.module
        label, detail = type(module).__name__, " ".join(module.extra_repr().split())
        specs = [self._spec(match.root_spec) for match in group]
        specs += [self._spec(term.spec) for term in replacement.results]
        if len(specs) == 1:
            return (*boxes, Box("module", label, detail, *specs[0], reads, True))
        boxes.append(Box("module", label, detail, None, None, reads, False))
        place = (len(boxes) - 1,)
        parts = (Box("view", "getitem", str(i), *s, place, True) for i, s in enumerate(specs))
        return (*boxes, *parts)

    def _input(
        self, term: Term, names: Mapping[fx.Node, str], boxes: list[Box], places: dict[Any, int]
    ) -> int:
        """The place of a value's box among ``boxes``, to which it is added once."""
        key: Any = term.node
        if term.node is not None:
            box = self._outside(term.node, names)
        elif term.op == "get_attr":  # this and the next: see edits.Insertion
            key = path = term.attributes["path"]
            label = path.rpartition(".")[2]
            box = Box("parameter", label, "", *self._spec(term.spec), (), False)
        else:  # a part of a tensor that no node holds
            source = self._input(term.operands[0], names, boxes, places)
            extent = slice(*(term.attributes[name] for name in ("start", "stop", "step")))
            key = source, str(extent)
            detail = _argument((..., extent))
            box = Box("view", "getitem", detail, *self._spec(term.spec), (source,), False)
        if key not in places:
            places[key] = len(boxes)
            boxes.append(box)
        return places[key]

    def _outside(self, node: fx.Node, names: Mapping[fx.Node, str]) -> Box:
        spec = self._spec(node.meta.get("spec"))
        if node.op == "get_attr":
            path = str(node.target)
            return Box("parameter", path.rpartition(".")[2], "", *spec, (), False)
        label = names.get(node) or node.name.rstrip("0123456789").rstrip("_")
        return Box("input", label, "", *spec, (), False)

    def _operator(self, node: fx.Node, reads: tuple[int, ...], result: bool) -> Box:
        spec = self._spec(node.meta.get("spec"))
        if node.op == "call_module":
            label, detail = type(self.memory.module(node)).__name__, str(node.target)
            return Box("module", label, detail.rpartition(".")[2], *spec, reads, result)
        kind = "view" if self.memory.is_view(node) else "operator"
        given = [_argument(argument) for argument in node.args]
        given += [f"{name}={_argument(argument)}" for name, argument in node.kwargs.items()]
        detail = ", ".join(filter(None, given))
        return Box(kind, self.memory.operator(node), detail, *spec, reads, result)

    def _spec(self, spec: TensorSpec | None) -> tuple[str | None, Shape | None]:
        if spec is None:
            return None, None
        shape = self._shapes.get(spec.shape)
        if shape is None:
            shape = self._shapes[spec.shape] = tuple(
                s if isinstance(s, int) else str(s.xreplace(self._size_names)) for s in spec.shape
            )
        return str(spec.dtype).removeprefix("torch."), shape


def _is_drawn(source: fx.Node) -> bool:
    """Sizes are told by the shapes."""
    return source.target != "size"


def _argument(value: Any) -> str:
    """An argument in a word; empty for a node, which is drawn, and for a list of nodes."""
    if isinstance(value, fx.Node):
        return "" if _is_drawn(value) else value.name
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_argument, value)))
    if isinstance(value, slice):
        parts = [value.start, value.stop] + ([value.step] if value.step not in (None, 1) else [])
        return ":".join("" if part is None else _argument(part) for part in parts)
    return "..." if value is Ellipsis else str(value).removeprefix("torch.")


def _size_names(trace: Trace) -> dict[sympy.Basic, sympy.Symbol]:
    """What the call that was traced names the sizes: s26 -> batch."""
    names: dict[sympy.Basic, sympy.Symbol] = {}
    inputs = trace.guards.call.tensors if trace.guards is not None else {}
    for node in trace.graph.nodes:
        spec, known = node.meta.get("spec"), inputs.get(str(node.target))
        if node.op != "placeholder" or spec is None or known is None:
            continue
        for size, name in zip(spec.shape, known.sizes, strict=True):
            if isinstance(name, str) and isinstance(size, sympy.Symbol):
                names[size] = sympy.Symbol(name, integer=True, positive=True)
    return names
