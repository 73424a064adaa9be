"""The public functions: optimize a model, trace it without rewriting, compare any two.

opt = liger_fx.optimize(model)
print(opt)              # LigerRMSNorm, LigerSwiGLUMLP, ... where they are
print(opt.report)       # each site, before and after, and the reasons for the rest
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from liger_fx.engine.rule import Selection, discover
from liger_fx.errors import (
    MissedSiteError,
    NothingRewrittenWarning,
    UsageError,
    VerificationError,
    VerificationWarning,
)
from liger_fx.graph_model import GraphModel, build
from liger_fx.module_tree import copy_tree
from liger_fx.planning import Planner
from liger_fx.report import GraphDiff
from liger_fx.tracing.call import example_call
from liger_fx.tracing.root_state import attributes_kept

Inputs = Mapping[str, Any] | tuple[Any, ...] | None


def optimize(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    rules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    strict: bool = False,
    verify: bool = False,
) -> GraphModel:
    """Trace ``model`` and rewrite what the rules find into named modules; ``model`` stays as it is.

    The result shares the model's parameters (what changes them in place, ``.half()`` for one,
    changes both) and is of its class too: it generates, trains and saves as the model does.
    ``result.report`` says what was rewritten and why the rest was not.

    inputs: example inputs, keyword arguments as a mapping or positional ones as a tuple. A
        transformers language model needs none; any other module does.
    rules: names of the rules to apply (``liger-fx rules`` lists them), or module paths to apply
        them in (``model.layers.0``, ``*.mlp``), or both (``rms_norm@model.norm``); all of them,
        everywhere, by default.
    exclude: rules, module paths or both to leave alone, written likewise.
    strict: raise MissedSiteError if a site that looked like one could not be rewritten, or none
        was found.
    verify: run ``liger_fx.verify`` on the result, and leave alone each site that fails, with a
        VerificationWarning; VerificationError if the whole still fails without them.

    Raises UsageError for what is no model or lacks inputs, and TraceError, naming the module, the
    line and the way out, for a model that cannot be put into a graph. Warns
    NothingRewrittenWarning.
    """
    _check_model(model)
    selection = _selection(model, rules, exclude)
    optimized = _rewritten(model, inputs, selection)
    if verify:
        optimized = _without_faults(model, inputs, selection, optimized)
    assert optimized.report is not None
    _judge(model, optimized.report, selection, strict)
    return optimized


def _rewritten(model: nn.Module, inputs: Inputs, selection: Selection | None) -> GraphModel:
    planner, tree = Planner(selection), copy_tree(model)
    # What hangs on the copy may lead back to the given model: a bound method, a closure.
    with attributes_kept(model):
        return build(tree, planner(tree, example_call(model, inputs)), planner)


def _without_faults(
    model: nn.Module, inputs: Inputs, selection: Selection, optimized: GraphModel
) -> GraphModel:
    """The model rewritten again, without the sites that verify finds at fault."""
    from liger_fx.verification import verify

    dropped: dict[tuple[str, str], str] = {}
    while not (found := verify(model, optimized, inputs)).ok:
        faults = {check.path: check.fault for check in found.sites if check.fault}
        new = {
            (site.rule, site.path): f"verify dropped it: {faults[place]}"
            for site in optimized.plans[0].sites
            if (place := (site.after or "").removeprefix("call_module ")) in faults
        }
        if not new:
            raise VerificationError(f"{type(model).__name__}: {found.faults[0]}")
        for (rule, path), why in new.items():
            warnings.warn(f"{path} ({rule}): {why}", VerificationWarning, stacklevel=3)
        dropped |= new
        entries = tuple(f"{rule}@{path}" for rule, path in new)
        selection = replace(selection, excluded=(*selection.excluded, *entries))
        optimized = _rewritten(model, inputs, selection)
        optimized.plans[0].explain(dropped)
    optimized.plans[0].note(found.summary())
    return optimized


def trace(model: nn.Module, inputs: Inputs = None) -> GraphModel:
    """The model as one graph, nothing rewritten; ``inputs`` and errors as for ``optimize``."""
    _check_model(model)
    return _rewritten(model, inputs, None)


def compare(a: nn.Module, b: nn.Module, inputs: Inputs = None) -> GraphDiff:
    """What differs between two models, plain ones traced with ``inputs``, traced or optimised."""
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


def _judge(model: nn.Module, report: GraphDiff, selection: Selection, strict: bool) -> None:
    name = type(model).__name__
    refused = len(report.refused)
    # What the caller chose to leave alone is not missed.
    missed = [s for s in report.refused if selection.refusal(s.rule, s.path) is None]
    if strict and missed:
        first = missed[0]
        raise MissedSiteError(
            f"{name}: {len(missed)} of {len(report.sites)} sites were not rewritten; the first is "
            f"{first.path} ({first.rule}): {first.reason}"
        )
    if report.rewritten:
        return
    text = f"{name}: nothing was rewritten; the result's report lists {refused} refused sites."
    if strict:
        raise MissedSiteError(text)
    warnings.warn(text, NothingRewrittenWarning, stacklevel=3)
