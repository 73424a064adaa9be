"""The graph of an optimised model under verification: does it serve the calls, do its sites hold?

GraphModel, calls   ->   a check of each named module, and what cannot be said, as notes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from liger_fx.graph_model import GraphModel
from liger_fx.module_tree import copy_tree
from liger_fx.tracing.call import UnsupportedCall, named_arguments
from liger_fx.tracing.retry import trace_tree
from liger_fx.verification.sites import SiteCheck, check_sites

Call = tuple[tuple[Any, ...], dict[str, Any]]


def check_graph(
    model: nn.Module, opt: nn.Module, calls: Sequence[Call]
) -> tuple[list[SiteCheck], list[str]]:
    """The sites of `opt`, checked on the first call that its first graph can take; and notes.

    A model that is no GraphModel has no graph to check: nothing is found and nothing noted.
    """
    if not isinstance(opt, GraphModel):
        return [], []
    notes = list(_not_served(opt, calls))
    plan = opt.plans[0]
    fitting = (given for given in _inputs(opt, calls) if given.keys() >= set(plan.inputs))
    inputs = next(fitting, None)
    if inputs is None:
        notes.append(f"no site was checked: its graph needs {', '.join(plan.inputs)}")
        return [], notes
    tree = copy_tree(model).train(plan.guards.training)
    try:
        return check_sites(trace_tree(tree, plan.guards.call), plan.graph, opt, inputs), notes
    except LookupError as mismatch:
        return [], [*notes, f"no site was checked: the graph is not the model's, {mismatch}"]


def _inputs(opt: GraphModel, calls: Sequence[Call]) -> Iterator[dict[str, Any]]:
    for args, kwargs in calls:
        try:
            yield named_arguments(opt.model_class.forward, args, kwargs)
        except UnsupportedCall:
            yield {}


def _not_served(opt: GraphModel, calls: Sequence[Call]) -> Iterator[str]:
    """A call that no graph serves ran the model's own forward: it says nothing of the graph."""
    for given in _inputs(opt, calls):
        if not any(plan.holds(opt, given) for plan in opt.plans):
            names = ", ".join(given) or "these inputs"
            yield f"no graph serves a call with {names}, so nothing was verified by it"
