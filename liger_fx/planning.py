"""How a kind of call becomes a plan: traced, and rewritten where rules are to be applied.

    Planner(Selection())(tree, call)   ->   Plan: the graph, rewritten; its guards; its report
    Planner(None)(tree, call)          ->   Plan: the plain graph

It is plain data, so that a pickled, copied or saved model traces further kinds of call as it did.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from liger_fx.engine.rewriter import rewrite
from liger_fx.engine.rule import Selection, discover
from liger_fx.plan import Plan
from liger_fx.report import GraphDiff, Side
from liger_fx.tracing.call import CallSpec
from liger_fx.tracing.retry import trace_tree


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one model; ``selection`` says what is rewritten, None that nothing is."""

    selection: Selection | None

    def __call__(self, root: nn.Module, call: CallSpec) -> Plan:
        """A plan for this kind of call of ``root``, into which named modules are put.

        TraceError for what cannot be put into a graph.
        """
        # A GraphModel is traced by its model's forward: its own one would run the graph it has.
        traced = trace_tree(root, call, getattr(root, "model_class", type(root)).forward)
        if self.selection is None:
            return Plan(traced)
        rules = discover()
        before = Side.of(root, traced.graph)
        rewriting = rewrite(traced, rules, self.selection)
        report = GraphDiff(
            before,
            Side.of(root, traced.graph),
            tuple(rewriting.sites),
            rules=tuple(rule.name for rule in rules),
            inputs=traced.guards.call.describe(),
            guards=tuple(traced.guards.describe()),
            opaque=tuple(map(str, traced.opaque)),
        )
        return Plan(traced, report)
