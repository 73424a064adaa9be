"""What verify found, as sections of a report.

Verified(ok=True, ...)   ->   Lines("Verified", ("at least as accurate as the original, ...", ...)),
                              Table("Relative L2 error against float64", ...), ...
"""

from __future__ import annotations

from collections.abc import Iterator

from liger_fx.report.folding import fold, fold_paths, shape
from liger_fx.report.section import Cell, Lines, Section, Table
from liger_fx.report.verified import Measured, Verified, VerifiedSite


def verdict(verified: Verified) -> str:
    """What verify found, in a sentence."""
    told = "at least as accurate as the original" if verified.ok else "NOT as promised"
    return f"{told}, in {verified.dtype} on {verified.device}"


def verified_sections(found: Verified) -> Iterator[Section]:
    """The verdict, the whole model's errors, and each site."""
    rows = [_measured(m) for m in (*found.together, *((found.worst,) if found.worst else ()))]
    headers = ("", "original", "optimised", "ratio", "at most", "")
    yield Lines("Verified", (verdict(found), f"inputs: {found.inputs}", *found.faults))
    yield Table("Relative L2 error against float64", headers, rows)
    groups = fold(found.sites, key=lambda s: (shape(s.path), s.rule, s.fault is None))
    by_site = [_verified_sites(group) for group in groups]
    yield Table(
        "Each site against float64", ("where", "sites", "outputs", "gradients", ""), by_site
    )
    yield Lines("Not looked at by verify", found.remarks)


def _verified_sites(group: list[VerifiedSite]) -> tuple[Cell, ...]:
    outputs, gradients = (
        f"{max(ratios):.2f} x" if (ratios := [m.ratio for m in found if m and m.ratio]) else "-"
        for found in ([s.outputs for s in group], [s.gradients for s in group])
    )
    where = fold_paths(site.path for site in group)
    return where, len(group), outputs, gradients, group[0].fault or "ok"


def _measured(m: Measured) -> tuple[Cell, ...]:
    errors = ("not finite" if e is None else f"{e:.2e}" for e in (m.original, m.optimised))
    ratio = "not finite" if m.ratio is None else f"{m.ratio:.2f}"
    return (m.name, *errors, ratio, f"{m.bound}", "ok" if m.ok else "FAILS")
