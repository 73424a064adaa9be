"""A Verification as the plain data that a report keeps.

Verification(together=(Comparison(...), ...), sites=(SiteCheck(...), ...), ...)   ->   Verified
"""

from __future__ import annotations

import math

from liger_fx.report.verified import Measured, Verified, VerifiedSite
from liger_fx.verification.accuracy import Comparison
from liger_fx.verification.findings import Findings
from liger_fx.verification.sites import SiteCheck


def summarise(found: Findings) -> Verified:
    """The verdict, the whole model's errors, the worst single gradient, and each site."""
    single = max((c for c in found.single if not c.zero), key=lambda c: c.ratio, default=None)
    return Verified(
        ok=found.ok,
        dtype=found.dtype,
        device=found.device,
        inputs=found.inputs,
        faults=found.faults,
        together=tuple(map(_measured, found.together)),
        worst=None if single is None else _measured(single),
        sites=tuple(map(_site, found.sites)),
        remarks=found.remarks,
    )


def _site(check: SiteCheck) -> VerifiedSite:
    outputs, gradients = (
        None if c is None else _measured(c) for c in (check.outputs, check.gradients)
    )
    return VerifiedSite(check.path, check.rule, check.fault, outputs, gradients)


def _measured(c: Comparison) -> Measured:
    original, optimised, ratio = map(_finite, (c.original, c.optimised, c.ratio))
    return Measured(c.name, original, optimised, ratio, c.bound, c.ok)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
