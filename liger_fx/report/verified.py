"""What verify() found, as plain data that a report keeps and shows when the models are gone.

Verified(ok=True, together=(Measured("outputs", 1.1e-07, 0.9e-07, 0.82, 1.1, True), ...), ...)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Relative L2 errors against float64 of original and optimised, their ratio and its limit.

    A number that is not finite is None.
    """

    name: str
    original: float | None
    optimised: float | None
    ratio: float | None
    bound: float
    ok: bool


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

    together: the outputs, and all gradients, each as one. worst: the parameter whose gradient came
    off worst. remarks: what was not looked at, a sentence each.
    """

    ok: bool
    dtype: str
    device: str
    inputs: str
    faults: tuple[str, ...]
    together: tuple[Measured, ...]
    worst: Measured | None
    sites: tuple[VerifiedSite, ...]
    remarks: tuple[str, ...] = ()
