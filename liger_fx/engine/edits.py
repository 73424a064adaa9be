"""Changes of a graph, with what is known about it kept true: positions, module calls, metadata."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from liger_fx.engine.facts import Facts, computes
from liger_fx.engine.pairs import Group
from liger_fx.engine.rule import Replacement
from liger_fx.engine.term import Term
from liger_fx.tracing.effects import is_effectful
from liger_fx.tracing.trace import ModuleCall


@dataclass(frozen=True)
class Rewrite:
    """In ``node.meta["rewrite"]`` of each new node: the rule, the names of the nodes it replaced,
    and the index of its site in ``Rewriting.sites``."""

    rule: str
    replaced: tuple[str, ...]
    site: int


class Insertion:
    """New nodes before one node of the graph, all with the metadata of the site they belong to."""

    def __init__(self, facts: Facts, place: fx.Node, meta: dict[str, Any]) -> None:
        self.facts, self.meta = facts, meta
        self.graph = facts.trace.graph
        self.place, self.position = place, facts.position[place] - 0.5

    def call(self, path: str, group: Group, replacement: Replacement) -> list[fx.Node]:
        """Call the module at ``path`` and let its results take the place of the matches' roots, and
        of the inner values that it gives. The nodes of these, which nothing may read."""
        with self.graph.inserting_before(self.place):
            inputs = tuple(map(self._input, replacement.inputs))
            places = [match.root for match in group]
            places += [term.node for term in replacement.results if term.node is not None]
            if len(places) == 1:
                self._take_place(places[0], self._node("call_module", path, inputs))
                return []
            results = self._node("call_module", path, inputs, spec=None)
            items = [
                self._node("call_function", operator.getitem, (results, i))
                for i, _ in enumerate(places)
            ]
            for old, node in zip(places, items, strict=True):
                self._take_place(old, node)
            return items[len(group) :]

    def _take_place(self, old: fx.Node, node: fx.Node) -> None:
        node.meta["spec"] = old.meta["spec"]
        self.facts.replace(old, node)

    def _input(self, term: Term) -> fx.Node:
        """The node of a value; a part of a tensor that no node holds gets a getitem, a parameter
        that a leaf module holds a get_attr."""
        if term.node is not None:
            return self.facts.now(term.node)
        if term.op == "get_attr":
            return self._node("get_attr", term.attributes["path"], (), spec=term.spec)
        if term.op != "slice":
            raise AssertionError(f"no node computes {term}")
        extent = slice(*(term.attributes[key] for key in ("start", "stop", "step")))
        source = self._input(term.operands[0])
        return self._node(
            "call_function", operator.getitem, (source, (..., extent)), spec=term.spec
        )

    def _node(self, op: str, target: Any, args: tuple[Any, ...], **meta: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args)
        node.meta = {
            key: value for key, value in {**self.meta, **meta}.items() if value is not None
        }
        self.facts.add(node, self.position)
        return node


def erase_unread(facts: Facts, nodes: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that nothing reads any more, last first.

    The views, sizes and parameters that only they have read go with them. Nodes that have other
    effects stay, unless they are among those given.
    """
    nodes = set(nodes)
    pending = sorted(nodes, key=facts.position.__getitem__)
    while pending:
        node = pending.pop()
        keeps = node.users or (node not in nodes and is_effectful(node))
        if node not in facts.position or keeps:
            continue
        inputs = [source for source in node.all_input_nodes if not computes(source)]
        facts.trace.graph.erase_node(node)
        del facts.position[node]
        pending += (source for source in inputs if source.op != "placeholder")


def follow(calls: Iterable[ModuleCall], facts: Facts) -> None:
    """Let the module calls name the nodes that stand there now."""

    def now(tree: Any) -> Any:
        if isinstance(tree, fx.Node):
            return facts.now(tree)
        if isinstance(tree, tuple | list):
            return type(tree)(map(now, tree))
        if isinstance(tree, dict):
            return {key: now(value) for key, value in tree.items()}
        return tree

    for call in calls:
        call.args, call.kwargs, call.output = now(call.args), now(call.kwargs), now(call.output)
