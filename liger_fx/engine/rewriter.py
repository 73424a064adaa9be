"""Runs the rules over a trace: a site becomes one call_module node, or a line that says why not.

    to = h.to(float32); pow_1 = to.pow(2); mean = ...; mul_1 = weight * to_1
 ->
    model_layers_0_input_layernorm = self.model.layers.0.input_layernorm(h)

Each rule is one pass: search, decide, replace, drop what nothing reads any more, lint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import fx, nn

from liger_fx.engine.accounts import captured_names, refused, rewritten, unexplained
from liger_fx.engine.drawer import Drawer
from liger_fx.engine.edits import Insertion, Rewrite, erase_unread, follow
from liger_fx.engine.facts import Facts
from liger_fx.engine.legality import check_effects, check_hooks, check_readers
from liger_fx.engine.match import Match
from liger_fx.engine.mounting import Mounting, Plan
from liger_fx.engine.pairs import Group, insertion_point, pair_up
from liger_fx.engine.rule import Reject, Rule, Selection
from liger_fx.engine.search import search
from liger_fx.engine.site import Site
from liger_fx.engine.terms import Terms
from liger_fx.tracing.garbage import garbage_kept
from liger_fx.tracing.trace import Trace
from liger_fx.tracing.tree_state import is_named


@dataclass(frozen=True)
class Rewriting:
    """The trace's graph and tree, both changed in place, and an account of every candidate."""

    graph: fx.Graph
    root: nn.Module
    sites: list[Site]


def rewrite(
    trace: Trace,
    rules: Iterable[Rule],
    selection: Selection | None = None,
    watch: Callable[[Rule, Facts, Terms], None] | None = None,
) -> Rewriting:
    """Apply the rules one after the other to the graph and the module tree of ``trace``, in place.

    ``selection`` leaves sites out, which are then listed as refused. ``watch`` sees what each rule
    sees, before it. The graph is linted after every rule that changed it; ``trace.calls`` follow
    the new nodes.
    """
    rules, sites = list(rules), list[Site]()
    with garbage_kept():
        facts = Facts(trace)
        drawer, view = Drawer(facts), Terms(trace.root)
        for rule in rules:
            if watch is not None:
                watch(rule, facts, view)
            if _Pass(facts, view, rule, selection or Selection(), drawer).run(sites):
                view = Terms(trace.root)
        follow(trace.calls, facts)
        trace.opaque = [leaf for leaf in trace.opaque if not is_named(facts.module(leaf.path))]
        sites += unexplained(facts, rules, sites)
    return Rewriting(trace.graph, trace.root, sites)


class _Pass:
    """One rule over the whole graph."""

    def __init__(
        self, facts: Facts, view: Terms, rule: Rule, selection: Selection, drawer: Drawer
    ) -> None:
        self.facts, self.view, self.drawer = facts, view, drawer
        self.rule, self.selection = rule, selection
        self.mounting = Mounting(rule, facts, view)
        self.plans: dict[fx.Node, Plan] = {}
        self.given: list[fx.Node] = []

    def run(self, sites: list[Site]) -> bool:
        """Append the rule's sites; whether the graph has changed."""
        matches, refusals = search(self.rule, self.facts, self.view, self._allow)
        for refusal in refusals:
            site = refused(self.rule, refusal, self.facts)
            sites.append(replace(site, drawing=self.drawer.refused(refusal)))
        for group, plan in pair_up(self.rule, matches, self.plans, self.facts):
            self._replace(group, plan, sites)
        if matches:
            gone = [n for m in matches for n in (*m.covered, m.root)]
            erase_unread(self.facts, (*gone, *self.given))
            self.facts.trace.graph.lint()
        return bool(matches)

    def _allow(self, match: Match) -> None:
        """Raises Reject; what was decided is kept for the replacement."""
        match.found = self.rule.check(match)
        check_readers(match, self.facts)
        check_effects(match, self.facts)
        check_hooks(match, self.facts)
        plan = self.mounting.plan(match)
        left_out = self.selection.refusal(self.rule.name, plan.path)
        if left_out is not None:
            raise Reject(left_out)
        self.plans[match.root] = plan

    def _replace(self, group: Group, plan: Plan, sites: list[Site]) -> None:
        """One call_module node for the matches of a group."""
        place = insertion_point(group, self.facts)
        if place is None:  # another replacement came in between: one node each, then
            for match in group:
                self._replace((match,), self.plans[match.root], sites)
            return
        path = self.mounting.put(plan)
        replaced = {node for match in group for node in (*match.covered, match.root)}
        names = [n.name for n in sorted(replaced, key=self.facts.position.__getitem__)]
        note = Rewrite(self.rule.name, tuple(names), len(sites))
        drawing = self.drawer.rewritten(
            group, plan.replacement, captured_names(group), self.rule.takes_linear
        )
        site = rewritten(self.rule, group, plan, path, self.facts)
        sites.append(replace(site, drawing=drawing))
        root = group[0].root
        meta = {**root.meta, "rewrite": note}
        if plan.owner is not None and root.op != "call_module":  # its caller makes the node now
            caller = self.facts.caller(root)
            meta.update(call=caller.index, module=caller.path)
        self.given += Insertion(self.facts, place, meta).call(path, group, plan.replacement)
