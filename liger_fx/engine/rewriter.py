"""Runs the rules over a trace: a site becomes one call_module node, or a line that says why not.

    to = h.to(float32); pow_1 = to.pow(2); mean = ...; mul_1 = weight * to_1
 ->
    model_layers_0_input_layernorm = self.model.layers.0.input_layernorm(h)

Each rule is one pass: search, decide, replace, drop what nothing reads any more, lint.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from liger_fx.engine.accounts import refused, rewritten, unexplained
from liger_fx.engine.facts import Facts
from liger_fx.engine.legality import check_effects, check_readers
from liger_fx.engine.matcher import Match
from liger_fx.engine.mounting import Mounting, Plan
from liger_fx.engine.pairs import Group, insertion_point, pair_up
from liger_fx.engine.rule import Reject, Rule, Selection
from liger_fx.engine.search import search
from liger_fx.engine.site import Site
from liger_fx.engine.term import Term
from liger_fx.engine.terms import Terms
from liger_fx.tracing.effects import is_effectful
from liger_fx.tracing.trace import Trace


@dataclass(frozen=True)
class Rewrite:
    """In ``node.meta["rewrite"]`` of each new node: the rule, the names of the nodes it replaced,
    and the index of its site in ``Rewriting.sites``."""

    rule: str
    replaced: tuple[str, ...]
    site: int


@dataclass(frozen=True)
class Rewriting:
    """The trace's graph and tree, both changed in place, and an account of every candidate."""

    graph: fx.Graph
    root: nn.Module
    sites: list[Site]


def rewrite(trace: Trace, rules: Iterable[Rule], selection: Selection | None = None) -> Rewriting:
    """Apply the rules one after the other to the graph and the module tree of ``trace``, in place.

    ``selection`` leaves sites out, which are then listed as refused. The graph is linted after
    every rule that changed it; ``trace.calls`` follow the new nodes.
    """
    rules, sites = list(rules), list[Site]()
    for rule in rules:
        _Pass(trace, rule, selection or Selection()).run(sites)
    sites += unexplained(trace, rules, sites)
    return Rewriting(trace.graph, trace.root, sites)


class _Pass:
    def __init__(self, trace: Trace, rule: Rule, selection: Selection) -> None:
        self.trace, self.rule, self.selection = trace, rule, selection
        self.facts, self.view = Facts(trace), Terms(trace.root)
        self.mounting = Mounting(rule, self.facts, self.view)
        self.plans: dict[fx.Node, Plan] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.here = 0.0  # the place of new nodes in the graph's order

    def run(self, sites: list[Site]) -> None:
        matches, refusals = search(self.rule, self.facts, self.view, self._allow)
        sites += [refused(self.rule, refusal, self.facts) for refusal in refusals]
        for group, plan in pair_up(self.rule, matches, self.plans, self.facts):
            self._replace(group, plan, sites)
        if self.replaced:
            self._forget_replaced(matches)
            self.trace.graph.lint()

    def _allow(self, match: Match) -> None:
        """Raises Reject; what was decided is kept for the replacement."""
        match.found = self.rule.check(match)
        check_readers(match)
        check_effects(match, self.facts)
        plan = self.mounting.plan(match)
        left_out = self.selection.refusal(self.rule.name, plan.path)
        if left_out is not None:
            raise Reject(left_out)
        self.plans[match.root] = plan

    def _replace(self, group: Group, plan: Plan, sites: list[Site]) -> None:
        """One call_module node for the matches of a group, before the first reader of any."""
        path = self.mounting.put(plan)
        sites.append(rewritten(self.rule, group, plan, path, self.facts))
        place = insertion_point(group, self.facts)
        assert place is not None  # pair_up joins no matches without one
        replaced = tuple(n.name for m in group for n in (*m.covered, m.root))
        note = Rewrite(self.rule.name, tuple(dict.fromkeys(replaced)), len(sites) - 1)
        root = group[0].root
        meta = {**root.meta, "rewrite": note}
        if plan.owner is not None and root.op != "call_module":  # its caller makes the node now
            caller = self.trace.calls[self.facts.call(root).parent or 0]
            meta.update(call=caller.index, module=caller.path)
        self.here = self.facts.position[place] - 0.5
        with self.trace.graph.inserting_before(place):
            inputs = tuple(self._emit(term, meta) for term in plan.replacement.inputs)
            call = self._node("call_module", path, inputs, meta)
            if len(group) == 1:
                self._substitute(root, call)
            else:
                call.meta.pop("spec", None)
                for i, match in enumerate(group):
                    spec = {
                        **meta,
                        "spec": match.root_spec,
                        "source": match.root.meta.get("source"),
                    }
                    self._substitute(
                        match.root, self._node("call_function", operator.getitem, (call, i), spec)
                    )

    def _node(self, op: str, target: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> fx.Node:
        node = self.trace.graph.create_node(op, target, args)
        node.meta = dict(meta)
        self.facts.position[node] = self.here
        return node

    def _substitute(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def _emit(self, term: Term, meta: dict[str, Any]) -> fx.Node:
        """The node of a value; a part of a tensor that no node holds gets a getitem."""
        if term.node is not None:
            return self.replaced.get(term.node, term.node)
        if term.op != "slice":
            raise AssertionError(f"no node computes {term}")
        extent = slice(*(term.attributes[key] for key in ("start", "stop", "step")))
        source = self._emit(term.operands[0], meta)
        return self._node(
            "call_function", operator.getitem, (source, (..., extent)), {**meta, "spec": term.spec}
        )

    def _forget_replaced(self, matches: list[Match]) -> None:
        """Erase what nothing reads any more, last first; the module calls name the new nodes."""
        gone = {n for m in matches for n in (*m.covered, m.root)}
        inputs = {n for node in gone for n in node.all_input_nodes} - gone
        for node in sorted(gone, key=self.facts.position.__getitem__, reverse=True):
            if not node.users and not is_effectful(node):
                self.trace.graph.erase_node(node)
        for node in inputs:
            if node.op == "get_attr" and not node.users:
                self.trace.graph.erase_node(node)
        for call in self.trace.calls:
            call.args, call.kwargs, call.output = self._follow(
                (call.args, call.kwargs, call.output)
            )

    def _follow(self, tree: Any) -> Any:
        if isinstance(tree, fx.Node):
            return self.replaced.get(tree, tree)
        if isinstance(tree, tuple | list):
            return type(tree)(map(self._follow, tree))
        if isinstance(tree, dict):
            return {key: self._follow(value) for key, value in tree.items()}
        return tree
