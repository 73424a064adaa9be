"""Promise 6: how far a model is from a float64 run of the same weights, and which of two is nearer.

    exact = measure(float64_copy(model), inputs, float64=True)
    theirs, ours = measure(model, inputs), measure(opt, inputs)
    judge = Judge(); judge.add(exact, theirs, ours); judge.faults()

The error of a call is the relative L2 error ||x - exact|| / ||exact|| of its tensors taken as one
long vector; that of several calls is the root of their mean square. Small vectors round by luck, so
a verdict is given on all calls of a test together.
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


Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What one forward and backward gave, as float64."""

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
    return tensor.detach().double()


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
    theirs: float = 0.0
    ours: float = 0.0
    calls: int = 0

    def add(self, scale: float, exact: Tensors, theirs: Tensors, ours: Tensors) -> None:
        """Adds one call's tensors, taken as one long vector of the square `scale`."""
        self.theirs += sum(map(_square, theirs, exact)) / scale
        self.ours += sum(map(_square, ours, exact)) / scale
        self.calls += 1

    def errors(self) -> tuple[float, float]:
        """Their and our relative L2 error: the root of the mean square over the calls."""
        return math.sqrt(self.theirs / self.calls), math.sqrt(self.ours / self.calls)


def _square(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x - exact).square().sum().item()


def _scale(tensors: Tensors) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors) or 1.0


@dataclass
class Judge:
    """Collects runs of the original and of its rewrite against the exact one, then judges them."""

    outputs: _Sums = field(default_factory=_Sums)
    gradients: _Sums = field(default_factory=_Sums)
    parameters: dict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))

    def add(self, exact: Run, theirs: Run, ours: Run) -> None:
        """Adds one call; the three runs must have the same outputs and gradients."""
        assert exact.gradients.keys() == theirs.gradients.keys() == ours.gradients.keys()
        for name, tensor in (ours.outputs | ours.gradients).items():
            assert tensor.isfinite().all(), f"{name} is not finite"
        outputs = [[run.outputs[n] for n in exact.outputs] for run in (exact, theirs, ours)]
        gradients = [[run.gradients[n] for n in exact.gradients] for run in (exact, theirs, ours)]
        self.outputs.add(_scale(outputs[0]), *outputs)
        # A parameter's errors too are on the scale of all gradients: its own may be all zero, as
        # those of q_proj are where each token that counts sees only itself.
        scale = _scale(gradients[0])
        self.gradients.add(scale, *gradients)
        for i, name in enumerate(exact.gradients):
            self.parameters[name].add(scale, *([group[i]] for group in gradients))

    def ratio(self, sums: _Sums) -> float:
        """Our error over theirs; 1.0 where neither has one."""
        theirs, ours = sums.errors()
        return ours / theirs if theirs else (math.inf if ours else 1.0)

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
