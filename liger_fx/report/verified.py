"""What verify() found, as plain data that a report can keep and show when the models are gone.

Verification(together=(Comparison(...), ...), sites=(SiteCheck(...), ...), ...)   ->   Verified
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liger_fx.verification import Verification
    from liger_fx.verification.accuracy import Comparison


@dataclass(frozen=True)
class Measured:
    """Relative L2 errors against float64 of original and optimised, and their ratio's limit.

    A number that is not finite is None.
    """

    name: str
    original: float | None
    optimised: float | None
    ratio: float | None
    bound: float
    ok: bool

    @classmethod
    def of(cls, c: Comparison) -> Measured:
        return cls(
            c.name, _finite(c.original), _finite(c.optimised), _finite(c.ratio), c.bound, c.ok
        )


@dataclass(frozen=True)
class VerifiedSite:
    """One named module against the nodes it replaced; ``fault`` is None when it is right."""

    path: str
    rule: str
    fault: str | None
    outputs: Measured | None
    gradients: Measured | None


@dataclass(frozen=True)
class Verified:
    """The verdict, what it was reached with, and what was measured.

    together: the outputs, and all gradients, each as one. worst: the single gradient that came
    off worst.
    """

    ok: bool
    dtype: str
    device: str
    inputs: str
    faults: tuple[str, ...]
    together: tuple[Measured, ...]
    worst: Measured | None
    sites: tuple[VerifiedSite, ...]

    @classmethod
    def of(cls, found: Verification) -> Verified:
        """The summary of a verification."""
        single = max((c for c in found.single if not c.zero), key=lambda c: c.ratio, default=None)
        return cls(
            found.ok,
            found.dtype,
            found.device,
            found.inputs,
            found.faults,
            tuple(map(Measured.of, found.together)),
            _measured(single),
            tuple(
                VerifiedSite(
                    site.path,
                    site.rule,
                    site.fault,
                    _measured(site.outputs),
                    _measured(site.gradients),
                )
                for site in found.sites
            ),
        )


def _measured(comparison: Comparison | None) -> Measured | None:
    return None if comparison is None else Measured.of(comparison)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
