"""Which nodes of the traced graph a rewritten node stands for.

    traced:     x -> to -> pow -> mean -> add -> rsqrt -> mul -> mul_1 -> q_proj
    rewritten:  x -> LigerRMSNorm -> q_proj                   ->   inputs (x,), results (mul_1,)

Both graphs are of one trace, so a node that was not replaced has one name in both. What a new node
stands for shows in the nodes that read it: at the same place they read the old one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from operator import getitem

from torch import fx


@dataclass(frozen=True)
class Pair:
    """A node that a rule made, and its inputs and results in the traced graph.

    new: the call_module node of the rewritten graph.
    inputs: traced nodes by the name of the new node's argument they stand for.
    results: the traced nodes whose values the new node gives.
    places: where in the new node's tuple each of them is; empty when it gives one tensor.
    """

    new: fx.Node
    inputs: dict[str, fx.Node]
    results: tuple[fx.Node, ...]
    places: tuple[int, ...]


def pairs(traced: fx.Graph, rewritten: fx.Graph) -> list[Pair]:
    """A Pair for each node that a rule made, in graph order.

    Raises LookupError, naming the node, where a result's counterpart cannot be told.
    """
    old = {node.name: node for node in traced.nodes}
    counterpart: dict[str, fx.Node] = dict(old)
    found = []
    for node in rewritten.nodes:
        if node.op != "call_module" or "rewrite" not in node.meta:
            continue
        inputs = {arg.name: counterpart[arg.name] for arg in node.all_input_nodes}
        parts = [user for user in node.users if user.target is getitem and "rewrite" in user.meta]
        places = tuple(int(str(part.args[1])) for part in parts)
        results = tuple(_counterpart(part, node, old) for part in parts or [node])
        for part, result in zip(parts or [node], results, strict=True):
            counterpart[part.name] = result
        found.append(Pair(node, inputs, results, places))
    return found


def _counterpart(part: fx.Node, maker: fx.Node, old: dict[str, fx.Node]) -> fx.Node:
    for user in part.users:
        if user.name in old:
            mine, theirs = user.all_input_nodes, old[user.name].all_input_nodes
            if len(mine) == len(theirs):
                return theirs[mine.index(part)]
    replaced = {name for name in maker.meta["rewrite"].replaced if name in old}
    leaving = [old[n] for n in replaced if any(u.name not in replaced for u in old[n].users)]
    if len(leaving) != 1:
        raise LookupError(f"{part.name} stands for one of {sorted(node.name for node in leaving)}")
    return leaving[0]


def between(
    inputs: Collection[fx.Node], results: Collection[fx.Node], graph: fx.Graph
) -> list[fx.Node]:
    """The nodes that compute `results` from `inputs`, in order, but those that read no input."""
    reached = set(inputs)
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    needed: set[fx.Node] = set()
    todo = [node for node in results if node in reached]
    while todo:
        node = todo.pop()
        if node in needed or node in inputs:
            continue
        needed.add(node)
        todo += [n for n in node.all_input_nodes if n in reached]
    return [node for node in graph.nodes if node in needed]
