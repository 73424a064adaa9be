"""The public functions: optimize a model, trace it without rewriting, compare any two.

opt = liger_fx.optimize(model)
print(opt)              # LigerRMSNorm, LigerSwiGLUMLP, ... where they are
print(opt.report)       # each site, before and after, and the reasons for the rest
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from liger_fx.engine.rule import Selection, discover
from liger_fx.engine.site import Site
from liger_fx.errors import (
    MissedSiteError,
    NothingRewrittenWarning,
    TraceError,
    UsageError,
    VerificationError,
    VerificationWarning,
)
from liger_fx.inputs import example_arguments
from liger_fx.model.account import blocks_of, side_of, sites_of, tree_rows
from liger_fx.model.block import Block
from liger_fx.model.blocks import find_blocks
from liger_fx.model.build import build
from liger_fx.model.compile_ahead import compile_ahead
from liger_fx.model.planner import Planner
from liger_fx.model.rehearsal import rehearsed
from liger_fx.modules.compile_ahead import get_ready
from liger_fx.report.between import Subject
from liger_fx.report.between import compare as compare_subjects
from liger_fx.report.blocks import FallbackRow
from liger_fx.report.graph_diff import GraphDiff
from liger_fx.tracing.call import UnsupportedCall, flat_inputs
from liger_fx.tracing.garbage import garbage_kept
from liger_fx.tracing.inner_blocks import examples_of
from liger_fx.tracing.naming import describe_call
from liger_fx.tracing.root_state import attributes_kept
from liger_fx.tracing.walk import modules_by_path

Inputs = Mapping[str, Any] | tuple[Any, ...] | None


def optimize(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    rules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    blocks: Iterable[str] | None = None,
    logits: Literal["lazy", "always"] = "lazy",
    strict: bool = False,
    verify: bool = False,
) -> Block:
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
    blocks: paths or globs of the modules that are traced, rewritten and called by themselves,
        besides the model; ``()`` makes one flat graph. By default every PreTrainedModel inside and
        every layer that can be checkpointed; in other models the alike entries of a ModuleList.
    logits: "always" computes all logits of a language model, and the loss from them, as the model
        does. By default training computes them when something reads the output's ``logits``, from
        the weights that stand then: RuntimeError if these have changed.
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
    if logits not in ("lazy", "always"):
        raise UsageError(f"logits is 'lazy' or 'always', not {logits!r}.")
    if logits == "always":
        selection = replace(selection, excluded=(*selection.excluded, "linear_cross_entropy"))
    for what, flag in (("strict", strict), ("verify", verify)):
        if not isinstance(flag, bool):
            raise UsageError(f"{what} is True or False, not {flag!r}.")
    _check_names("blocks", blocks)
    chosen = None if blocks is None else tuple(blocks)
    optimized = _blocks(model, inputs, selection, chosen)
    if verify:
        optimized = _without_faults(model, inputs, selection, chosen, optimized)
    _judge(model, sites_of(optimized), selection, strict)
    return optimized


@garbage_kept()
def _blocks(
    model: nn.Module, inputs: Inputs, selection: Selection | None, chosen: Iterable[str] | None
) -> Block:
    """The model as blocks, those that the example call reaches with a graph."""
    get_ready(model)
    planner = Planner(selection)
    planner.original = tree_rows(model)
    paths = find_blocks(model, chosen)
    arguments = example_arguments(model, inputs)
    root = build(model, paths, planner)
    # What hangs on the copy may lead back to the given model: a bound method, a closure.
    with attributes_kept(model):
        try:
            call = describe_call(root, arguments, inner=False)
            values = flat_inputs(call.arguments, arguments)
            _, plan = planner.plan(root, call, examples_of(call, values))
        except UnsupportedCall as unsupported:
            raise UsageError(f"The example inputs hold {unsupported}.") from None
        except TraceError as failure:
            _run_inside(root, arguments, failure)
        else:
            compile_ahead(root, plan, arguments)
    return root


def _run_inside(root: Block, arguments: dict[str, Any], failure: TraceError) -> None:
    """The root cannot be put into a graph: run it, so that the blocks inside it are called."""
    inside = [block for path, block in blocks_of(root).items() if path]
    if not inside or any(p.is_meta for p in root.parameters()):
        raise failure
    planner = root._block.planner
    planner.note(FallbackRow("", root.block_class.__name__, ", ".join(arguments), str(failure)))
    try:
        with rehearsed(root):
            root.block_class.forward(root, **arguments)
    except Exception as error:
        raise failure from error
    if not any(block.plans for block in inside):
        raise failure


def _without_faults(
    model: nn.Module,
    inputs: Inputs,
    selection: Selection,
    chosen: Iterable[str] | None,
    optimized: Block,
) -> Block:
    """The model rewritten again, without the sites that verify finds at fault."""
    from liger_fx.verification import verify

    dropped: dict[tuple[str, str], str] = {}
    while not (found := verify(model, optimized, inputs)).ok:
        faults = {check.path: check.fault for check in found.sites if check.fault}
        new = {
            (site.rule, site.path): f"verify dropped it: {faults[place]}"
            for site in sites_of(optimized)
            if (place := (site.after or "").removeprefix("call_module ")) in faults
        }
        if not new:
            raise VerificationError(f"{type(model).__name__}: {found.faults[0]}")
        for (rule, path), why in new.items():
            warnings.warn(f"{path} ({rule}): {why}", VerificationWarning, stacklevel=3)
        dropped |= new
        entries = tuple(f"{rule}@{path}" for rule, path in new)
        selection = replace(selection, excluded=(*selection.excluded, *entries))
        optimized = _blocks(model, inputs, selection, chosen)
        for path, block in blocks_of(optimized).items():
            for plan in block.plans:
                plan.explain(_below(dropped, path))
    optimized._block.planner.verified = found.summary()
    return optimized


def _below(reasons: dict[tuple[str, str], str], path: str) -> dict[tuple[str, str], str]:
    """The reasons for sites inside the block at ``path``, under their paths in it."""
    prefix = f"{path}." if path else ""
    return {
        (rule, place.removeprefix(prefix)): why
        for (rule, place), why in reasons.items()
        if place.startswith(prefix)
    }


def trace(model: nn.Module, inputs: Inputs = None, *, blocks: Iterable[str] | None = None) -> Block:
    """The model's graphs, nothing rewritten; arguments and errors as for ``optimize``."""
    _check_model(model)
    return _blocks(model, inputs, None, None if blocks is None else tuple(blocks))


def compare(a: nn.Module, b: nn.Module, inputs: Inputs = None) -> GraphDiff:
    """What differs between any two of: a plain model, a traced one, an optimised one.

    A plain model is traced first, with ``inputs`` as in ``trace`` (and raises what that raises).
    The sites, rules, guards and opaque modules are those of b's own report; a site that a's report
    holds as well is no difference and is left out, and ``changes`` says what is rewritten in one of
    them alone.
    """
    return compare_subjects(subject_of(a, inputs), subject_of(b, inputs))


def subject_of(model: nn.Module, inputs: Inputs = None) -> Subject:
    """A model as ``compare`` sees it; a plain one is traced first."""
    made = model if isinstance(model, Block) else trace(model, inputs)
    return Subject(side_of(made), made.report)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
    for kind, name in ((fx.GraphModule, "torch.fx"), (torch.jit.ScriptModule, "torch.jit")):
        if isinstance(model, kind):
            raise UsageError(
                f"{type(model).__name__} is a {name}.{kind.__name__} already; optimise the model "
                "it was made from."
            )
    modules = modules_by_path(model)
    sharded = {cls for cls in set(map(type, modules.values())) if _is_sharded(cls)}
    for path in (path for path, module in modules.items() if type(module) in sharded):
        raise UsageError(
            f"{path or type(model).__name__} is sharded already: FSDP gathers the weights of the "
            "modules that it was given, and the result has others. Shard what optimize returns."
        )


def _is_sharded(cls: type) -> bool:
    """Told by names: to import FSDP takes time."""
    names = ("FSDPModule", "FullyShardedDataParallel")
    bases = (c for c in cls.__mro__ if c.__module__.startswith("torch.distributed"))
    return any(base.__name__ in names for base in bases)


def _selection(model: nn.Module, rules: Iterable[str] | None, exclude: Iterable[str]) -> Selection:
    for what, names in (("rules", rules), ("exclude", exclude)):
        _check_names(what, names)
    selection = Selection(None if rules is None else tuple(rules), tuple(exclude))
    known = discover()
    unknown = selection.unknown(known, model)
    if unknown:
        raise UsageError(
            f"{', '.join(map(repr, unknown))}: no rule and no module of {type(model).__name__} has "
            f"that name. The rules are {', '.join(rule.name for rule in known)}."
        )
    return selection


def _check_names(what: str, names: Any) -> None:
    if isinstance(names, str):
        raise UsageError(f"{what}: expected a list of names, got the single string {names!r}.")
    if names is not None and not isinstance(names, Iterable):
        raise UsageError(f"{what}: expected a list of names, got a {type(names).__name__}.")


def _judge(model: nn.Module, sites: tuple[Site, ...], selection: Selection, strict: bool) -> None:
    name = type(model).__name__
    refused = [site for site in sites if site.reason is not None]
    # What the caller chose to leave alone is not missed.
    missed = [s for s in refused if selection.refusal(s.rule, s.path) is None]
    if strict and missed:
        first = missed[0]
        raise MissedSiteError(
            f"{name}: {len(missed)} of {len(sites)} sites were not rewritten; the first is "
            f"{first.path} ({first.rule}): {first.reason}"
        )
    if len(refused) < len(sites):
        return
    text = f"{name}: nothing was rewritten; the result's report lists {len(refused)} refused sites."
    if strict:
        raise MissedSiteError(text)
    warnings.warn(text, NothingRewrittenWarning, stacklevel=3)
