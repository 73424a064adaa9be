"""How far two computations of one thing are from the exact one, and whether the second is worse.

    exact, original, optimised   ->   errors 1.1e-07 and 0.9e-07, ratio 0.82

An error is relative and in the L2 norm: ||x - exact|| / ||exact||, all given tensors as one vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# What rounding to the dtype alone may cost: half a unit in the last place.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11}
ROUNDING[torch.bfloat16] = 2.0**-8


@dataclass
class Squares:
    """Sums of squares over every tensor added: of the exact values, and of both errors."""

    exact: float = 0.0
    original: float = 0.0
    optimised: float = 0.0

    def add(self, exact: torch.Tensor, original: torch.Tensor, optimised: torch.Tensor) -> None:
        """Count tensors of one shape, `exact` in float64; what is not finite is wrong by inf."""
        self.exact += _square(exact)
        self.original += _square(original.double() - exact)
        self.optimised += _square(optimised.double() - exact)

    def merge(self, other: Squares) -> None:
        """Count everything that `other` counted."""
        self.exact += other.exact
        self.original += other.original
        self.optimised += other.optimised


def _square(tensor: torch.Tensor) -> float:
    value = tensor.square().sum().item()
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Comparison:
    """The errors of original and optimised, and the most that the optimised one's may be.

    name: what was compared.
    original, optimised: relative L2 errors against float64.
    bound: the factor allowed.
    rounding: half a unit in the last place of the dtype. An error below it is no error: the exact
        result itself, rounded once to the dtype, is that far off. Without this floor an original
        that is exact by luck would turn any rounding at all into a failure.
    zero: the exact value is zero (a bias whose gradient cancels, say), so that both errors are
        rounding noise and no ratio of them means anything; it is always ok.
    """

    name: str
    original: float
    optimised: float
    bound: float
    rounding: float
    zero: bool = False

    @classmethod
    def of(
        cls, name: str, squares: Squares, bound: float, rounding: float, zero: bool = False
    ) -> Comparison:
        scale = squares.exact or 1.0
        errors = math.sqrt(squares.original / scale), math.sqrt(squares.optimised / scale)
        return cls(name, *errors, bound, rounding, zero)

    @property
    def ratio(self) -> float:
        """The optimised error over the original's, neither taken as less than one rounding."""
        if not math.isfinite(self.optimised):
            return math.inf
        return max(self.optimised, self.rounding) / max(self.original, self.rounding)

    @property
    def ok(self) -> bool:
        """Whether the promise holds here."""
        return self.zero or self.ratio <= self.bound

    @property
    def in_doubt(self) -> bool:
        """Whether it fails by so little that rounding may have fallen so by chance."""
        return not self.ok and self.ratio <= 2 * self.bound
