"""What the engine looks up about a graph, gathered in one walk so that every question is cheap."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

from torch import fx, nn

from liger_fx.engine.term import target_name
from liger_fx.tracing.effects import is_effectful
from liger_fx.tracing.trace import ModuleCall, Trace

# Views and casts cost nothing worth keeping: when something else reads one, it simply stays.
_FREE = {
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "getattr", "size",
    "getitem", "chunk", "split", "narrow", "unbind", "view", "reshape", "flatten", "unflatten",
    "view_as", "transpose", "swapaxes", "swapdims", "unsqueeze", "expand", "contiguous",
    "repeat_interleave",
}  # fmt: skip


class Facts:
    """Order, effects and module calls of one trace, kept true while the engine changes the graph.

    position: the place of each node in the graph's order; new nodes lie between the numbers.
    effects: the places of those nodes of the trace that change a tensor, a cache or a mode.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.position: dict[fx.Node, float] = {}
        self.leaf_calls: dict[str, list[fx.Node]] = defaultdict(list)
        self.calls_of: dict[str, list[ModuleCall]] = defaultdict(list)
        self._nodes_of: dict[int, list[fx.Node]] = defaultdict(list)
        self._children: dict[int, list[int]] = defaultdict(list)
        self._replaced: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(trace.graph.nodes):
            self.add(node, i)
        effects = [(n, place) for n, place in self.position.items() if is_effectful(n, self.root)]
        self.effects = dict(effects)
        self._effect_positions = list(self.effects.values())
        for call in trace.calls:
            self.calls_of[call.path].append(call)
            if call.parent is not None:
                self._children[call.parent].append(call.index)

    def add(self, node: fx.Node, position: float) -> None:
        """Take a node into account."""
        self.position[node] = position
        self._nodes_of[node.meta.get("call") or 0].append(node)
        if node.op == "call_module":
            self.leaf_calls[str(node.target)].append(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let everything that reads ``old`` read ``new``."""
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def now(self, node: fx.Node) -> fx.Node:
        """The node that stands where ``node`` stood when the graph was traced."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    @property
    def root(self) -> nn.Module:
        """The tree that the graph's targets are paths in."""
        return self.trace.root

    def module(self, path: str) -> nn.Module:
        """The module at a path; "" is the root."""
        return self.root.get_submodule(path)

    def call(self, node: fx.Node) -> ModuleCall:
        """The innermost module call that made the node."""
        return self.trace.calls[node.meta.get("call") or 0]

    def caller(self, node: fx.Node) -> ModuleCall:
        """The module call around that one."""
        return self.trace.calls[self.call(node).parent or 0]

    def output(self, call: ModuleCall) -> fx.Node | None:
        """The node that a module call returns, as it is now; None for anything but one tensor."""
        return self.now(call.output) if isinstance(call.output, fx.Node) else None

    def effects_between(self, first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
        """The nodes between the two that change a tensor, a cache or a mode, in order."""
        start = bisect_right(self._effect_positions, self.position[first])
        for node, place in islice(self.effects.items(), start, None):
            if place >= self.position[last]:
                return
            if node in self.position:  # else it was part of a match
                yield node

    def nodes_below(self, call: ModuleCall) -> Iterator[fx.Node]:
        """All nodes made during a module call, those of the calls inside it included."""
        for inner in self.calls_below(call):
            for node in self._nodes_of.get(inner.index, ()):
                if node in self.position:
                    yield node

    def calls_below(self, call: ModuleCall) -> Iterator[ModuleCall]:
        """A module call and all calls inside it."""
        pending = [call.index]
        while pending:
            index = pending.pop()
            yield self.trace.calls[index]
            pending += self._children.get(index, ())

    def is_replaced(self, call: ModuleCall) -> bool:
        """Whether a module call has computed something, and nothing of that stands any more."""
        indices = [inner.index for inner in self.calls_below(call)]
        made = [node for i in indices for node in self._nodes_of.get(i, ()) if computes(node)]
        return bool(made) and not any(node in self.position for node in made)

    def is_inside(self, call: ModuleCall | None, outer: ModuleCall) -> bool:
        """Whether a call is the other one, or was made during it."""
        while call is not None and call.index > outer.index:
            call = None if call.parent is None else self.trace.calls[call.parent]
        return call is outer

    def innermost_holding(self, nodes: list[fx.Node]) -> ModuleCall:
        """The innermost module call during which all the nodes were made."""
        call = self.call(nodes[0])
        while not all(self.is_inside(self.call(node), call) for node in nodes):
            call = self.trace.calls[call.parent or 0]
        return call


def computes(node: fx.Node) -> bool:
    """Whether the node has work to do: neither a view nor a cast nor a parameter nor a size."""
    if node.op == "call_module":
        return True
    return node.op in ("call_function", "call_method") and target_name(node) not in _FREE
