"""verify(model, opt): run both and a float64 reference, as a whole and site by site, and judge.

model, opt   ->   Verification: ok, the faults in words, a table of errors and their ratios
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from liger_fx.errors import UsageError
from liger_fx.report.folding import fold
from liger_fx.report.verified import Verified
from liger_fx.verification.accuracy import ROUNDING, Comparison
from liger_fx.verification.graph import check_graph
from liger_fx.verification.inputs import SHAPES, example_inputs
from liger_fx.verification.sites import SiteCheck
from liger_fx.verification.whole import dtype_of, evaluating, measure


@dataclass(frozen=True)
class Verification:
    """What was found; `ok` is the verdict and `str()` the tables.

    together: the outputs, and all gradients, each as one; single: each parameter's gradient.
    sites: the named modules one by one; empty when `opt` does not come from liger_fx.
    notes: what is wrong apart from accuracy, as sentences.
    """

    class_name: str
    dtype: str
    device: str
    inputs: str
    together: tuple[Comparison, ...]
    single: tuple[Comparison, ...]
    sites: tuple[SiteCheck, ...]
    notes: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """Everything that breaks the promise, the faulty sites first; empty when it holds."""
        faulty = (site for site in self.sites if site.fault)
        return (
            *(f"{s.path} ({s.class_name}, rule {s.rule}): {s.fault}" for s in faulty),
            *self.notes,
            *(_broken(c) for c in self.together if not c.ok),
            *(_broken(c) for c in self.single if not c.ok),
        )

    @property
    def ok(self) -> bool:
        """Whether the optimised model keeps promise 6."""
        return not self.faults

    def summary(self) -> Verified:
        """The same for a report, which keeps it: ``report.with_verified(found.summary())``."""
        from liger_fx.verification.summary import summarise

        return summarise(self)

    def __str__(self) -> str:
        from liger_fx.verification.text import render

        return render(self)


def _broken(c: Comparison) -> str:
    what = c.name if c.name in ("outputs", "all gradients") else f"the gradient of {c.name}"
    return f"{what}: {c.ratio:.2f} x the original's error, more than {c.bound} x"


def verify(
    model: nn.Module, opt: nn.Module, inputs: Any = None, dtype: torch.dtype | None = None
) -> Verification:
    """Compare outputs and all gradients of `model` and `opt` with float64, per site and as a whole.

    inputs: one call's keyword arguments as a mapping, or its positional ones as a tuple; made for a
        transformers language model when None: four batches of several lengths, one padded, with
        labels where the model takes them, judged together.
    dtype: verify copies of both in this floating dtype instead of the models' own.

    Both run in eval mode and in the caller's autocast; the float64 reference is a copy of `model`
    (with the gradients of all three 24 bytes a parameter while it lasts, in float32). Nothing of
    either model is changed, .grad included. Raises UsageError when no inputs can be made.
    """
    calls = _calls(model, inputs)
    if dtype is not None:
        model, opt = copy.deepcopy((model, opt))  # together: they share their parameters
        model, opt = model.to(dtype), opt.to(dtype)
        calls = pytree.tree_map_only(torch.Tensor, functools.partial(_in_dtype, dtype), calls)
    with evaluating(model, opt), torch.enable_grad():
        totals = measure(model, opt, calls)
        sites, notes = check_graph(model, opt, calls)
    dtype = dtype_of(model)
    together, single = totals.comparisons(ROUNDING[dtype])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Verification(
        type(model).__name__,
        _dtype_text(dtype, device),
        str(device),
        "; ".join(map(_describe, calls)),
        tuple(together),
        tuple(single),
        tuple(sites),
        (*totals.faults, *notes),
    )


def _calls(model: nn.Module, inputs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    if inputs is None:
        return [((), example_inputs(model, *shape, seed=i)) for i, shape in enumerate(SHAPES)]
    if isinstance(inputs, Mapping):
        return [((), dict(inputs))]
    if isinstance(inputs, tuple):
        return [(inputs, {})]
    raise UsageError(
        f"inputs are a {type(inputs).__name__}; pass keyword arguments as a mapping, or a tuple."
    )


def _in_dtype(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _describe(call: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    args, kwargs = call
    named = [*((f"input {i}", value) for i, value in enumerate(args)), *kwargs.items()]
    alike = fold(named, key=lambda item: _short(item[1]))
    return ", ".join(" ".join([*(n for n, _ in group), _short(group[0][1])]) for group in alike)


def _dtype_text(dtype: torch.dtype, device: torch.device) -> str:
    names = [str(dtype).removeprefix("torch.")]
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
        names.append(f"under {str(autocast).removeprefix('torch.')} autocast")
    return " ".join(names)


def _short(value: Any) -> str:
    return " x ".join(map(str, value.shape)) if torch.is_tensor(value) else repr(value)[:40]
