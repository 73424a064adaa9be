"""The public functions: optimize a model, trace it without rewriting, compare any two.

opt = liger_fx.optimize(model)
print(opt)              # LigerRMSNorm, LigerSwiGLUMLP, ... where they are
print(opt.report)       # each site, before and after, and the reasons for the rest
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from liger_fx.engine.rule import Selection, discover
from liger_fx.errors import MissedSiteError, NothingRewrittenWarning, UsageError
from liger_fx.graph_model import GraphModel, build
from liger_fx.module_tree import copy_tree
from liger_fx.planning import Planner
from liger_fx.report import GraphDiff
from liger_fx.tracing.call import example_call

Inputs = Mapping[str, Any] | tuple[Any, ...] | None


def optimize(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    rules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    strict: bool = False,
) -> GraphModel:
    """Trace ``model`` and rewrite what the rules find into named modules; ``model`` stays as it is.

    The result shares the model's parameters and is of its class too: it generates, trains and
    saves as the model does. ``result.report`` says what was rewritten and why the rest was not.

    inputs: example inputs, keyword arguments as a mapping or positional ones as a tuple. A
    transformers
        language model needs none; any other module does.
    rules: names of the rules to apply (``liger-fx rules`` lists them), or module paths to apply
        them in (``model.layers.0``, ``*.mlp``); all of them, everywhere, by default.
    exclude: rule names or module paths to leave alone.
    strict: raise MissedSiteError if a site that looked like one could not be rewritten, or none
    was found.

    Raises UsageError for what is no model or lacks inputs, and TraceError, naming the module, the
    line and the way out, for a model that cannot be put into a graph. Warns
    NothingRewrittenWarning.
    """
    _check_model(model)
    selection = _selection(model, rules, exclude)
    make_plan = Planner(selection)
    tree = copy_tree(model)
    optimized = build(tree, make_plan(tree, example_call(model, inputs)), make_plan)
    assert optimized.report is not None
    _judge(model, optimized.report, strict)
    return optimized


def trace(model: nn.Module, inputs: Inputs = None) -> GraphModel:
    """The model as one torch.fx graph, nothing rewritten; ``inputs`` and errors as for
    ``optimize``."""
    _check_model(model)
    tree = copy_tree(model)
    make_plan = Planner(None)
    return build(tree, make_plan(tree, example_call(model, inputs)), make_plan)


def compare(a: nn.Module, b: nn.Module, inputs: Inputs = None) -> GraphDiff:
    """What differs between two models: plain, traced or optimised; plain ones are traced with
    ``inputs``."""
    return GraphDiff.between(a, b, inputs)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, fx.GraphModule):
        raise UsageError(
            f"{type(model).__name__} is a torch.fx.GraphModule already; optimise the model it was "
            "made from."
        )


def _selection(model: nn.Module, rules: Iterable[str] | None, exclude: Iterable[str]) -> Selection:
    for names in (rules, exclude):
        if isinstance(names, str):
            raise UsageError(f"Expected a list of names, got the single string {names!r}.")
    selection = Selection(None if rules is None else tuple(rules), tuple(exclude))
    known = discover()
    unknown = selection.unknown(known, model)
    if unknown:
        raise UsageError(
            f"{', '.join(map(repr, unknown))}: no rule and no module of {type(model).__name__} has "
            f"that name. The rules are {', '.join(rule.name for rule in known)}."
        )
    return selection


def _judge(model: nn.Module, report: GraphDiff, strict: bool) -> None:
    name = type(model).__name__
    refused = len(report.refused)
    if strict and refused:
        first = report.refused[0]
        raise MissedSiteError(
            f"{name}: {refused} of {len(report.sites)} sites were not rewritten; the first is "
            f"{first.path} ({first.rule}): {first.reason}"
        )
    if report.rewritten:
        return
    text = f"{name}: nothing was rewritten; the result's report lists {refused} refused sites."
    if strict:
        raise MissedSiteError(text)
    warnings.warn(text, NothingRewrittenWarning, stacklevel=3)
