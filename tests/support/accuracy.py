"""Promise 6: how far a model is from a float64 run of the same weights, and which of two is nearer.

    exact = measure(float64_copy(model), inputs, float64=True)
    theirs, ours = measure(model, inputs), measure(opt, inputs)
    judge = Judge(); judge.add(exact, theirs, ours); judge.faults()

The error of a tensor is its relative L2 error, ||x - exact|| / ||exact||; several tensors, or
several runs, are judged as one long vector. Small vectors round by luck, so a verdict is given on
the runs of a test taken together.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

OUTPUTS_BOUND = 1.1
GRADIENTS_BOUND = 1.1
PARAMETER_BOUND = 1.5
LOW = (torch.float32, torch.bfloat16, torch.float16)


class InFloat64(TorchFunctionMode):
    """Reads every request for a shorter floating dtype as one for float64.

    A float64 copy of a model is not enough: models upcast with `.float()` and `.to(torch.float32)`,
    which would take a float64 run down again.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        raised = {name: _raise(value) for name, value in (kwargs or {}).items()}
        return func(*map(_raise, args), **raised)


def _raise(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOW else value


@dataclass(frozen=True)
class Run:
    """What one forward and backward gave, as float64 on the CPU."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def float64_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` in float64. Experts run one by one: grouped_mm has no float64 kernel."""
    exact = copy.deepcopy(model).double()
    if getattr(exact.config, "_experts_implementation", None) == "grouped_mm":
        exact.set_experts_implementation("eager")  # type: ignore[operator]
    return exact


def measure(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    *,
    float64: bool = False,
    autocast: torch.dtype | None = None,
    loss_scale: float = 1.0,
) -> Run:
    """One training step's forward and backward, without a step; `inputs` must hold labels.

    `float64` runs as the exact reference does; `autocast` is the dtype of an autocast region around
    the forward; the loss is multiplied by `loss_scale` before the backward, and the gradients given
    with it. The gradients of `model` are cleared before and after.
    """
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device.type
    with InFloat64() if float64 else nullcontext():
        if float64:
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            result = model(**inputs)
        (result.loss * loss_scale).backward()
    outputs = {"logits": _exact(result.logits), "loss": _exact(result.loss)}
    gradients = {n: _exact(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Run(outputs, gradients)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().cpu()


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact||; of a zero `exact`, the norm of `ours`; infinite for a NaN."""
    error = (ours - exact).norm().item() / (exact.norm().item() or 1.0)
    return math.inf if math.isnan(error) else error


def furthest(ours: Run, theirs: Run) -> float:
    """The largest relative difference between two runs, over outputs and each gradient."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    pairs = [(ours.outputs[n], theirs.outputs[n]) for n in theirs.outputs]
    pairs += [(ours.gradients[n], theirs.gradients[n]) for n in theirs.gradients]
    return max(relative(a, b) for a, b in pairs)


@dataclass
class _Sums:
    exact: float = 0.0
    theirs: float = 0.0
    ours: float = 0.0

    def add(self, exact: torch.Tensor, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        self.exact += exact.square().sum().item()
        self.theirs += (theirs - exact).square().sum().item()
        self.ours += (ours - exact).square().sum().item()

    def errors(self) -> tuple[float, float]:
        scale = self.exact or 1.0
        return math.sqrt(self.theirs / scale), math.sqrt(self.ours / scale)


@dataclass
class Judge:
    """Collects runs of the original and of its rewrite against the exact one, then judges them."""

    floor: float = 0.0  # a relative error below this counts as exact, in both
    outputs: _Sums = field(default_factory=_Sums)
    gradients: _Sums = field(default_factory=_Sums)
    parameters: dict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))

    def add(self, exact: Run, theirs: Run, ours: Run) -> None:
        """Adds one call; the three runs must have the same outputs and gradients."""
        assert exact.gradients.keys() == theirs.gradients.keys() == ours.gradients.keys()
        for name, value in exact.outputs.items():
            assert ours.outputs[name].isfinite().all(), f"{name} is not finite"
            self.outputs.add(value, theirs.outputs[name], ours.outputs[name])
        for name, value in exact.gradients.items():
            grads = theirs.gradients[name], ours.gradients[name]
            assert grads[1].isfinite().all(), f"the gradient of {name} is not finite"
            self.gradients.add(value, *grads)
            self.parameters[name].add(value, *grads)

    def ratio(self, sums: _Sums) -> float:
        """Our error over theirs; 1.0 where both are below the floor."""
        theirs, ours = sums.errors()
        if ours <= self.floor:
            return min(1.0, ours / theirs if theirs else 1.0)
        return ours / max(theirs, self.floor) if max(theirs, self.floor) else math.inf

    def worst_parameter(self) -> tuple[str, float]:
        """The parameter whose gradient lost most, and by what factor."""
        ratios = {name: self.ratio(sums) for name, sums in self.parameters.items()}
        name = max(ratios, key=lambda key: ratios[key])
        return name, ratios[name]

    def faults(self) -> list[str]:
        """What breaks promise 6, in words; empty when it holds."""
        name, worst = self.worst_parameter()
        rows = [
            ("outputs", self.ratio(self.outputs), OUTPUTS_BOUND),
            ("gradients", self.ratio(self.gradients), GRADIENTS_BOUND),
            (f"gradient of {name}", worst, PARAMETER_BOUND),
        ]
        return [f"{what}: {got:.3f} x > {bound} x" for what, got, bound in rows if not got <= bound]
