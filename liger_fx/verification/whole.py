"""Promise 6 for a whole model: outputs, and the gradient of every parameter.

model, opt, a few batches   ->   outputs 0.97 x, all gradients 0.99 x, one parameter 1.12 x
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from liger_fx.errors import UsageError, one_line
from liger_fx.verification.accuracy import ROUNDING, Comparison, Squares
from liger_fx.verification.calls import Call, called_as
from liger_fx.verification.measure import Run, Tensors, run
from liger_fx.verification.reference import exact, in_float64, to_float64

TOGETHER, SINGLE = 1.1, 1.5  # promise 6: outputs and all gradients together; any one parameter's
# A gradient that is this much smaller than the largest one in float64 is zero up to float64's own
# rounding: adding to a key's bias, for one, moves every score of a row alike and changes nothing.
_ZERO = 1e-12


class Totals:
    """What was measured so far: squares for the outputs and for each parameter's gradient."""

    def __init__(self) -> None:
        self.outputs: dict[str, Squares] = defaultdict(Squares)
        self.gradients: dict[str, Squares] = defaultdict(Squares)
        self.faults: list[str] = []

    def add(self, exactly: Run, original: Run, optimised: Run) -> None:
        """Count one call; what only one of the two gives is a fault."""
        self._add("output", self.outputs, exactly.outputs, original.outputs, optimised.outputs)
        gradients = exactly.gradients, original.gradients, optimised.gradients
        self._add("gradient", self.gradients, *gradients)
        for name in original.outputs.keys() & optimised.outputs.keys():
            dtypes = original.outputs[name].dtype, optimised.outputs[name].dtype
            if dtypes[0] != dtypes[1]:
                self.fault(f"the output {name} is {_short(dtypes[1])}, not {_short(dtypes[0])}")

    def _add(
        self,
        what: str,
        sums: dict[str, Squares],
        exactly: Tensors,
        original: Tensors,
        ours: Tensors,
    ) -> None:
        for name in original.keys() ^ ours.keys():
            side = "original" if name in original else "optimised model"
            self.fault(f"only the {side} gives the {what} {name}")
        for name in exactly.keys() & original.keys() & ours.keys():
            shapes = original[name].shape, ours[name].shape
            if shapes[0] != shapes[1]:
                self.fault(f"the {what} {name} is {_sizes(shapes[1])}, not {_sizes(shapes[0])}")
            else:
                sums[name].add(exactly[name], original[name], ours[name])

    def fault(self, text: str) -> None:
        """Note what is wrong apart from accuracy, once."""
        if text not in self.faults:
            self.faults.append(text)

    def comparisons(self, rounding: float) -> tuple[list[Comparison], list[Comparison]]:
        """Outputs and gradients taken together, and each parameter's gradient alone."""
        together = [
            Comparison.of("outputs", merged(self.outputs.values()), TOGETHER, rounding),
            Comparison.of("all gradients", merged(self.gradients.values()), TOGETHER, rounding),
        ]
        largest = max((s.exact for s in self.gradients.values()), default=0.0)
        single = [
            Comparison.of(name, s, SINGLE, rounding, zero=s.exact <= _ZERO**2 * largest)
            for name, s in self.gradients.items()
        ]
        return together, single


def merged(all_squares: Iterable[Squares]) -> Squares:
    """Several sums of squares as one."""
    total = Squares()
    for squares in all_squares:
        total.merge(squares)
    return total


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def measure(model: nn.Module, opt: nn.Module, calls: Sequence[Call]) -> Totals:
    """Run every call through both models and the float64 one.

    Raises UsageError where the original itself fails.
    """
    totals = Totals()
    parameters = dict(model.named_parameters())
    ours = {name: p for name, p in opt.named_parameters() if name in parameters}
    for name in parameters.keys() - ours.keys():
        totals.faults.append(f"the optimised model has no parameter {name}")
    reference = in_float64(model)
    for call in calls:
        with called_as(call, model, opt, reference):
            original = _original(model, parameters, call)
        with called_as(call, model, opt, reference), exact():
            args, kwargs = to_float64((call.args, call.kwargs))
            exactly = run(reference, dict(reference.named_parameters()), args, kwargs)
        try:
            with called_as(call, model, opt, reference):
                optimised = run(opt, ours, call.args, call.kwargs)
        except Exception as error:  # a faulty module may fail in any way it likes
            totals.fault(f"the optimised model raises {type(error).__name__}: {one_line(error)}")
        else:
            totals.add(exactly, original, optimised)
    return totals


def _original(model: nn.Module, parameters: Tensors, call: Call) -> Run:
    try:
        return run(model, parameters, call.args, call.kwargs)
    except Exception as error:  # nor can anything be said of a call that the model does not take
        raise UsageError(
            f"The original {type(model).__name__} itself fails on these inputs: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's parameters have."""
    counts: dict[torch.dtype, int] = defaultdict(int)
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    found = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return found if found in ROUNDING else torch.float32
