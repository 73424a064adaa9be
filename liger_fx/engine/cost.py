"""What a set of nodes moves through memory and keeps for the backward pass, read off their specs.

    to, pow, mean, add, rsqrt, mul, to, mul   ->   Cost(traffic=..., saved=...) before and after

Before: each operator reads its tensors once and writes its result once, a view moves nothing, and
autograd keeps what the operator's derivative needs. After: linear layers stay as they are, and the
rest is one kernel, which reads what comes in from outside and writes what goes out. It keeps those
of its inputs from which the nodes before computed what they kept, and computes the rest once more
in the backward pass. Parameters count as traffic but not as kept: they are there anyway.

The experts of a mixture are one node, before and after: what goes on inside is not counted.

A size that varies from call to call counts as one, so that a tensor which has one is bytes for each
token. All parameters are taken to be trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import fx, nn

from liger_fx.engine.drawing import Bytes, Cost
from liger_fx.engine.memory import CASTS, Memory

# What autograd keeps for an operator (PyTorch's derivatives.yaml); for any other, its inputs.
_KEEPS_NOTHING = {"add", "sub", "neg", "mean", "sum", "cat", "stack", "repeat_interleave", *CASTS}
_KEEPS_RESULT = {"rsqrt", "sqrt", "sigmoid", "tanh", "exp", "relu", "reciprocal", "softmax"}


class Costs:
    """Costs of nodes of one graph. Make it before the graph is changed: which values carry a
    gradient is read off it once."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.memory = Memory(root)
        self._carries = _gradients(graph, self.memory)

    def before(self, nodes: Collection[fx.Node]) -> Cost:
        """What the nodes cost as they are."""
        return Cost(_total(map(self._moved, nodes)), self._sizes(self._kept(nodes)))

    def after(
        self,
        nodes: Collection[fx.Node],
        results: Collection[fx.Node],
        takes_linear: bool = False,
        handed_out: Collection[fx.Node] = (),
    ) -> Cost:
        """What they cost when one kernel computes ``results``, linear layers aside. It gives the
        inner values ``handed_out`` as well, and keeps these in place of what they come from.

        With ``takes_linear`` these are part of it, and it leaves the gradients of what comes in and
        of their parameters; their results go through memory once, in parts.
        """
        if takes_linear:
            return self._after_with_linear(nodes, results)
        out = set(handed_out)
        results = {*results, *out}
        aside = self._aside(nodes, results)
        fused = set(nodes) - aside
        coming = {source for node in fused for source in node.all_input_nodes} - fused
        going = {n for n in fused if n in results or not fused.issuperset(n.users)}
        needed = _upwards({n for node in fused for n in self._needs(node)}, fused - out)
        again = (coming | out) & needed
        kept = {self.memory.storage(node) for node in again if node.op != "get_attr"}
        return Cost(
            _total(map(self._moved, aside)) + self._sizes(coming) + self._sizes(going),
            self._sizes(self._kept(aside) | kept),
        )

    def _after_with_linear(self, nodes: Collection[fx.Node], results: Collection[fx.Node]) -> Cost:
        inside = set(nodes)
        linear = {node for node in inside if self._is_linear(node)}
        coming = {source for node in inside for source in node.all_input_nodes} - inside
        gradients = self._sizes(n for n in coming if self._carries.get(n, True))
        parameters = _total(self.memory.parameters(node) for node in linear)
        through = self._sizes(linear)
        moved = self._sizes(coming) + parameters + through + through + self._sizes(results)
        return Cost(moved, gradients + parameters)

    def _sizes(self, nodes: Iterable[fx.Node]) -> Bytes:
        return _total(map(self.memory.size, nodes))

    def _moved(self, node: fx.Node) -> Bytes:
        """Everything that one node reads and writes."""
        if node.op == "get_attr" or self.memory.is_view(node):
            return Bytes(0, 0)
        is_cast = self.memory.operator(node) in CASTS  # type_as looks at no more than a dtype
        moved = self._sizes((node, *node.all_input_nodes[: 1 if is_cast else None]))
        return moved + self.memory.parameters(node) if node.op == "call_module" else moved

    def _kept(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The activations that autograd keeps for the nodes' derivatives, each memory once."""
        found = {self.memory.storage(kept) for node in nodes for kept in self._needs(node)}
        return {node for node in found if node.op != "get_attr"}

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        """What the derivative of one operator needs."""
        name, tensors = self.memory.operator(node), node.all_input_nodes
        if not self._carries.get(node, True) or name in _KEEPS_NOTHING or self.memory.is_view(node):
            return []
        if name in _KEEPS_RESULT:
            return [node]
        if name == "mul" and len(tensors) == 2:  # each factor's gradient is made with the other
            return [x for x, y in (tensors, tensors[::-1]) if self._carries.get(y, True)]
        if name in ("mul", "truediv", "div") and not isinstance(node.args[1], fx.Node):
            return []  # by a number
        return tensors

    def _aside(self, nodes: Collection[fx.Node], results: Collection[fx.Node]) -> set[fx.Node]:
        """Linear layers, and what stays because something else reads it, with what that needs."""
        inside = set(nodes)
        linear = {node for node in inside if self._is_linear(node)}
        staying = {
            node for node in inside - linear
            if node not in results and not inside.issuperset(node.users)
        }  # fmt: skip
        return linear | (_upwards(staying, inside) & inside)

    def _is_linear(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return self.memory.operator(node) == "linear"
        return any(p.dim() > 1 for p in self.memory.module(node).parameters())


def _gradients(graph: fx.Graph, memory: Memory) -> dict[fx.Node, bool]:
    """Which nodes have a gradient: floating, computed from parameters, and not under no_grad."""
    carries: dict[fx.Node, bool] = {}
    enabled = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        spec = node.meta.get("spec")
        if not enabled or (spec is not None and not spec.dtype.is_floating_point):
            carries[node] = False
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            carries[node] = name in memory.root.get_submodule(owner)._parameters
        else:
            own = node.op == "call_module" and any(True for _ in memory.module(node).parameters())
            carries[node] = own or any(carries[source] for source in node.all_input_nodes)
    return carries


def _total(amounts: Iterable[Bytes]) -> Bytes:
    return sum(amounts, Bytes(0, 0))


def _upwards(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes and what they are computed from, up to what comes in from outside."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes if node in inside else ()
    return found
