"""Which nodes of the traced graph a rewritten site stands for.

traced:     x -> to -> pow -> mean -> add -> rsqrt -> mul -> mul_1 -> q_proj
rewritten:  x -> LigerRMSNorm -> q_proj                   ->   inputs {x: x}, results {norm: mul_1}

Both graphs are of one trace, so a node that was not replaced has one name in both. What a new node
stands for shows in the nodes that read it: at the same place they read the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Pair:
    """The nodes that a rule made at one site, and the traced nodes that they stand for.

    new: the nodes made, in graph order; one of them calls the named module.
    inputs: traced nodes, by the name under which the new nodes read them.
    results: traced nodes, by the name of the new node that gives their value now.
    """

    new: tuple[fx.Node, ...]
    inputs: dict[str, fx.Node]
    results: dict[str, fx.Node]

    @property
    def call(self) -> fx.Node:
        """The node that calls the named module."""
        return next(node for node in self.new if node.op == "call_module")


def pairs(traced: fx.Graph, rewritten: fx.Graph) -> list[Pair]:
    """A Pair for each site at which a rule made a call_module node, in graph order.

    Raises LookupError, naming the node, where its counterpart cannot be told.
    """
    old = {node.name: node for node in traced.nodes}
    sites: dict[int, list[fx.Node]] = {}
    for node in rewritten.nodes:
        if "rewrite" in node.meta:
            sites.setdefault(node.meta["rewrite"].site, []).append(node)
    known = {node.name: old[node.name] for node in rewritten.nodes if node.name in old}
    found = []
    for new in sites.values():
        outside = {arg for node in new for arg in node.all_input_nodes} - set(new)
        inputs = {arg.name: known[arg.name] for arg in outside}
        read = [node for node in new if not set(node.users) <= set(new)]
        results = {node.name: _counterpart(node, len(read) == 1, old) for node in read}
        known |= results
        if any(node.op == "call_module" for node in new):
            found.append(Pair(tuple(new), inputs, results))
    return found


def _counterpart(node: fx.Node, alone: bool, old: dict[str, fx.Node]) -> fx.Node:
    """The traced node whose value `node` gives; `alone` when its site has no other result."""
    for user in node.users:
        if user.name in old:
            mine, theirs = user.all_input_nodes, old[user.name].all_input_nodes
            if len(mine) == len(theirs):
                return theirs[mine.index(node)]
    replaced = {name for name in node.meta["rewrite"].replaced if name in old}
    leaving = [old[n] for n in replaced if any(u.name not in replaced for u in old[n].users)]
    if len(leaving) == 2 and node.target is operator.getitem:
        root, inner = max(leaving), min(leaving)
        if _comes_from(root, inner, replaced):  # the module gives inner values after the root's
            return (root, inner)[int(node.args[1])]  # type: ignore[arg-type]
    if not alone or len(leaving) != 1:
        raise LookupError(f"{node.name} may stand for any of {sorted(map(str, leaving))}")
    return leaving[0]


def _comes_from(node: fx.Node, source: fx.Node, inside: Collection[str]) -> bool:
    """Whether a node is computed from another one, by nodes of these names."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        here = pending.pop()
        if here is source:
            return True
        if here not in seen and here.name in inside:
            seen.add(here)
            pending += here.all_input_nodes
    return False


def between(inputs: Collection[fx.Node], results: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes that compute `results` from `inputs` and parameters, in graph order.

    A node that reads neither (a table of angles, a size) is left out: its value is given.
    """
    graph = next(iter(results)).graph
    reached, weights = set(inputs), set[fx.Node]()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        read = node.all_input_nodes
        if not reached.isdisjoint(read):
            reached.add(node)
        elif node.op == "get_attr" or (read and weights.issuperset(read)):
            weights.add(node)
    todo = [node for node in results if node not in inputs]
    while todo:
        node = todo.pop()
        if node in found or node.op == "get_attr":
            continue
        found.add(node)
        todo += [n for n in node.all_input_nodes if n in reached | weights and n not in inputs]
    return [node for node in graph.nodes if node in found]
