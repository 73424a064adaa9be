"""The graphs of an optimised model under verification: do they serve the calls, and their sites?

GraphModel, calls   ->   a check of each named module; faults; what was not looked at, as remarks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from liger_fx.graph_model import GraphModel
from liger_fx.module_tree import copy_tree
from liger_fx.plan import Plan
from liger_fx.tracing.retry import trace_tree
from liger_fx.verification.calls import Call, called_as
from liger_fx.verification.sites import SiteCheck, SiteChecks


@dataclass
class GraphCheck:
    """The sites, what is wrong apart from them, and what could not be looked at."""

    sites: list[SiteCheck] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_graph(model: nn.Module, opt: nn.Module, calls: Sequence[Call]) -> GraphCheck:
    """The sites of `opt`, on every call that a graph of theirs can take, each call in its modes.

    A model that is no GraphModel has no graph to check: nothing is found and nothing noted.
    """
    found = GraphCheck()
    if not isinstance(opt, GraphModel):
        return found
    found.faults += _not_served(opt, calls)
    checks = SiteChecks(model, opt)
    for plan, fitting in _plans_to_check(opt, calls):
        tree = copy_tree(model).train(plan.guards.training)
        with called_as(Call(training=plan.guards.training), opt):
            try:
                traced = trace_tree(tree, plan.guards.call)
                checks.run(traced, plan.graph, fitting)
            except LookupError as mismatch:
                found.faults.append(
                    f"no site was checked: the graph is not the model's, {mismatch}"
                )
    found.sites = checks.judged()
    if not found.sites and any(plan.report and plan.report.rewritten for plan in opt.plans):
        found.remarks.append("no site was checked by itself: no graph takes any of these calls")
    return found


def _plans_to_check(
    opt: GraphModel, calls: Sequence[Call]
) -> Iterator[tuple[Plan, list[dict[str, object]]]]:
    """The first graph in each mode that can take some of the calls, and those calls' inputs."""
    modes = set()
    for plan in opt.plans:
        if plan.guards.training in modes or not plan.guards.grad_enabled:
            continue
        fitting = []
        for call in calls:
            given = call.named(opt.model_class.forward) or {}
            if call.training == plan.guards.training and given.keys() >= set(plan.inputs):
                fitting.append(given)
        if fitting:
            modes.add(plan.guards.training)
            yield plan, fitting


def _not_served(opt: GraphModel, calls: Sequence[Call]) -> Iterator[str]:
    """A call that no graph serves ran the model's own forward: it says nothing of the graph."""
    for call in calls:
        given = call.named(opt.model_class.forward) or {}
        with called_as(call, opt):
            served = any(plan.holds(opt, given) for plan in opt.plans)
        if not served:
            names = ", ".join(given) or "these inputs"
            yield f"no graph serves a call with {names}, so nothing was verified by it"
