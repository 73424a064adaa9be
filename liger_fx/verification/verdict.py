"""verify(model, opt): run both and a float64 reference, as a whole and site by site, and judge.

model, opt   ->   Verification: ok, the faults in words, a table of errors and their ratios
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from liger_fx.errors import UsageError
from liger_fx.model.block import Block
from liger_fx.report.folding import fold
from liger_fx.report.verified import Verified
from liger_fx.verification.accuracy import ROUNDING
from liger_fx.verification.calls import Call, calls_of, calls_of_plans, in_dtype
from liger_fx.verification.findings import Findings
from liger_fx.verification.graph import check_graph
from liger_fx.verification.summary import summarise
from liger_fx.verification.text import render
from liger_fx.verification.whole import dtype_of, measure

FRESH_DRAWS = 4  # by which noise is told from fault, where an error fails by little


class Verification(Findings):
    """What ``verify`` found; `ok` is the verdict and `str()` the tables."""

    def summary(self) -> Verified:
        """The same for a report, which keeps it: ``report.with_verified(found.summary())``."""
        return summarise(self)

    def __str__(self) -> str:
        return render(self)


def verify(
    model: nn.Module, opt: nn.Module, inputs: Any = None, dtype: torch.dtype | None = None
) -> Verification:
    """Compare outputs and all gradients of `model` and `opt` with float64, per site and as a whole.

    inputs: one call's keyword arguments as a mapping, or its positional ones as a tuple; made for a
        transformers language model when None: four batches of several lengths, one padded, with
        labels where the model takes them, judged together. Where an error fails by little, four
        more draws of such inputs are made and all are judged together.
    dtype: verify copies of both in this floating dtype instead of the models' own.

    These calls are made in eval mode, and one more for each graph that `opt` has and that none of
    them is for, in the modes of that graph; in train mode dropout is left out. Autocast is the
    caller's. In another dtype the graphs are new ones, traced for it. The float64 reference is a
    copy of `model` (with the gradients of all three 24 bytes a parameter while it lasts, in
    float32). Nothing of either model is changed, .grad included. Raises UsageError when no inputs
    can be made, when the original fails on them, and for arguments of other kinds.
    """
    _check_arguments(model, opt, dtype)
    source = model
    if dtype is not None:
        model, opt = copy.deepcopy((model, opt))  # together: they share their parameters
        model, opt = model.to(dtype), opt.to(dtype)

    def calls_of_draw(draw: int) -> list[Call]:
        calls = calls_of(source, inputs, draw)
        return calls if dtype is None else [in_dtype(call, dtype) for call in calls]

    found = _verified(model, opt, [calls_of_draw(0)])
    if not found.in_doubt:
        return found
    try:
        again = _verified(model, opt, [calls_of_draw(draw) for draw in range(FRESH_DRAWS + 1)])
    except UsageError:  # the original does not take its inputs in another order
        return found
    return found if again.notes else again


def _verified(model: nn.Module, opt: nn.Module, draws: list[list[Call]]) -> Verification:
    calls, remarks = [], dict[str, None]()
    for own in draws:
        calls += own
        if isinstance(opt, Block):
            more, unserved = calls_of_plans(opt, own)
            calls += more
            remarks |= dict.fromkeys(unserved)
    totals = measure(model, opt, calls)
    graph = check_graph(model, opt, calls)
    dtype = dtype_of(model)
    together, single = totals.comparisons(ROUNDING[dtype])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Verification(
        type(model).__name__,
        _dtype_text(dtype, device),
        str(device),
        f"{len(draws)} draws of " * (len(draws) > 1)
        + "; ".join(dict.fromkeys(map(_describe, calls))),
        tuple(together),
        tuple(single),
        tuple(graph.sites),
        (*totals.faults, *graph.faults),
        (*remarks, *graph.remarks),
    )


def _check_arguments(model: Any, opt: Any, dtype: Any) -> None:
    for which, value in (("original", model), ("optimised model", opt)):
        if not isinstance(value, nn.Module):
            raise UsageError(f"The {which} is a {type(value).__name__}, not a torch.nn.Module.")
    if isinstance(model, Block) and not isinstance(opt, Block):
        raise UsageError("The original comes first: verify(model, opt).")
    if dtype is not None and dtype not in ROUNDING:
        known = ", ".join(map(str, ROUNDING))
        raise UsageError(f"dtype is {dtype!r}; verify works in {known}.")


def _describe(call: Call) -> str:
    positional = ((f"input {i}", value) for i, value in enumerate(call.args))
    alike = fold([*positional, *call.kwargs.items()], key=lambda item: _short(item[1]))
    texts = [" ".join([*(n for n, _ in group), _short(group[0][1])]) for group in alike]
    texts += ["in train mode"] * call.training + ["without gradients"] * (not call.grad)
    return ", ".join(texts)


def _dtype_text(dtype: torch.dtype, device: torch.device) -> str:
    names = [str(dtype).removeprefix("torch.")]
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
        names.append(f"under {str(autocast).removeprefix('torch.')} autocast")
    return " ".join(names)


def _short(value: Any) -> str:
    return " x ".join(map(str, value.shape)) if torch.is_tensor(value) else repr(value)[:40]
