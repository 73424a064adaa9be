"""A Verification as plain text: the verdict, the whole model, the worst gradients, the sites."""

from __future__ import annotations

import textwrap

from tabulate import tabulate

from liger_fx.report.folding import alike, fold, fold_paths, shape
from liger_fx.verification.accuracy import Comparison
from liger_fx.verification.findings import Findings
from liger_fx.verification.sites import SiteCheck

_WORST = 3  # parameters shown; all of them are in Verification.single
_FAULTS = 8


def render(found: Findings) -> str:
    """Every section."""
    verdict = "at least as accurate as the original" if found.ok else "NOT as promised"
    head = f"{found.class_name} in {found.dtype} on {found.device}: {verdict}"
    faults = [f"  - {fault}" for fault in found.faults[:_FAULTS]]
    if len(found.faults) > _FAULTS:
        faults.append(f"  - and {len(found.faults) - _FAULTS} more, all in .faults")
    sections = [
        "\n".join([head, *faults]),
        "Relative L2 error against float64\n" + _whole(found),
        "Sites, each on the tensors that arrive there\n" + _sites(found) if found.sites else "",
        "Inputs\n" + textwrap.fill(found.inputs, 100),
        "Not looked at\n" + "\n".join(found.remarks) if found.remarks else "",
    ]
    return "\n\n".join(section for section in sections if section)


def _whole(found: Findings) -> str:
    worst = sorted((c for c in found.single if not c.zero), key=lambda c: -c.ratio)[:_WORST]
    rows = [_row(c.name, c) for c in found.together]
    rows += [_row(f"gradient of {c.name}", c) for c in worst]
    headers = ("", "original", "optimised", "ratio", "at most", "")
    align = ("left", "right", "right", "right", "right", "left")
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def _row(name: str, c: Comparison) -> tuple[str, ...]:
    errors = f"{c.original:.2e}", f"{c.optimised:.2e}"
    return (name, *errors, f"{c.ratio:.2f}", f"{c.bound}", "ok" if c.ok else "FAILS")


def _sites(found: Findings) -> str:
    rows = []
    for group in fold(found.sites, key=_kind):
        worst = max(group, key=lambda site: _ratio(site.outputs) + _ratio(site.gradients))
        gap = max((site.gap for site in group if site.gap is not None), default=None)
        rows.append(
            (
                fold_paths(site.path for site in group),
                len(group),
                worst.class_name,
                _show(worst.outputs),
                _show(worst.gradients),
                "-" if gap is None else f"{gap:.0e}",
                "FAILS" if worst.fault else "ok",
            )
        )
    headers = ("where", "sites", "module", "outputs", "gradients", "float64 gap", "")
    align = ("left", "right", "left", "right", "right", "right", "left")
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def _kind(site: SiteCheck) -> tuple[str, ...]:
    return shape(site.path), site.rule, site.class_name, alike(site.fault or "")


def _ratio(c: Comparison | None) -> float:
    return c.ratio if c is not None else 0.0


def _show(c: Comparison | None) -> str:
    return f"{c.ratio:.2f} x" if c is not None else "-"
