"""Trace a block; what cannot be followed becomes a module that is called, and the trace starts
again."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from liger_fx.errors import TraceError
from liger_fx.tracing.call import CallSpec
from liger_fx.tracing.fakes import sizes_forgotten
from liger_fx.tracing.garbage import garbage_kept
from liger_fx.tracing.inner_blocks import NeedsInside
from liger_fx.tracing.outside import Key
from liger_fx.tracing.readiness import refuse_unready
from liger_fx.tracing.state import Place
from liger_fx.tracing.trace import Source, Trace
from liger_fx.tracing.tracer import (
    AsksAttributes,
    ChangesOutside,
    HFTracer,
    Plans,
    Untraceable,
    Watch,
)

_MAX_OPAQUE_CLASSES = 24


def trace_block(
    block: nn.Module,
    call: CallSpec,
    forward: Any = None,
    *,
    plans: Plans | None = None,
    examples: Mapping[str, Any] | None = None,
) -> Trace:
    """The trace of ``forward(block, **call)``, opaque leaves where it cannot be followed.

    A class of modules whose code stops the trace stays whole; it is the innermost one that is not
    itself a PreTrainedModel. TraceError where nothing below the top is left to keep whole;
    NeedsPlan where a block inside must be traced first.
    """
    refuse_unready(block)
    plans = plans or Plans()
    opaque: dict[type, tuple[str, Source | None]] = {}
    fixed: frozenset[str] = frozenset()
    writes: frozenset[Place] = frozenset()
    first: Untraceable | None = None
    watching, outside = False, frozenset[Key]()
    try:
        while True:
            try:
                tracer = HFTracer(opaque, fixed, writes, plans, watching, outside)
                return _traced(tracer, block, call, forward, examples)
            except Watch:
                watching = True
            except ChangesOutside as changes:
                outside |= changes.places
            except NeedsInside:
                plans = replace(plans, inside=True)
            except AsksAttributes as asks:
                known = {**plans.attributes, **plans.fixed_attributes}
                fixed_ones = {*asks.paths, *plans.fixed_attributes}
                plans = replace(
                    plans,
                    attributes={p: v for p, v in known.items() if p not in fixed_ones},
                    fixed_attributes={p: v for p, v in known.items() if p in fixed_ones},
                )
            except Untraceable as failure:
                # A module that fails when it is called whole takes its parents along: what the user
                # needs to know is where that began.
                if first is None or type(failure.stack[-1][1]) not in opaque:
                    first = failure
                culprit = _innermost(failure, opaque)
                writes |= set(failure.writes)
                outside |= {failure.outside} if failure.outside is not None else set()
                if culprit is not None and len(opaque) < _MAX_OPAQUE_CLASSES:
                    opaque = {**opaque, culprit: (str(failure), failure.source)}
                elif "its code fixes the" in str(failure) and fixed != frozenset(
                    ("batch", "sequence")
                ):
                    fixed = frozenset(("batch", "sequence"))
                    opaque = {}
                else:
                    raise _explain(first) from first
    finally:
        first = None  # which holds this frame, and so the examples


def _traced(tracer: HFTracer, *given: Any) -> Trace:
    context = contextvars.copy_context()
    try:
        with garbage_kept(), sizes_forgotten():
            return context.run(tracer.trace, *given)
    finally:
        tracer.let_go()


def _innermost(failure: Untraceable, opaque: dict[type, Any]) -> type | None:
    for path, module in reversed(failure.stack):
        kind = type(module)
        # A linear layer fails for what it is given by the code around it.
        whole = isinstance(module, (PreTrainedModel, nn.ModuleList, nn.Linear))
        if path and kind not in opaque and not whole:
            return kind
    return None


def _explain(failure: Untraceable) -> TraceError:
    path, module = failure.stack[-1]
    if isinstance(failure.inner, TraceError):  # of a block inside: its own path is below that one
        told = failure.inner
        path = f"{path}.{told.module}".rstrip(".")
        return TraceError(path, told.source, told.cause, told.way_out)
    return TraceError(
        module=path,
        source=failure.source,
        cause=f"{type(module).__name__}: {failure}",
        way_out=(
            "The model itself works as before; to optimise it, move this code into a submodule "
            "(it then stays a module that is called), or pass example inputs that avoid it."
        ),
    )
