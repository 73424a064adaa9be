"""Two optimised models, or two reports of one model: which sites were rewritten in one alone.

model.layers.0.mlp: LigerSwiGLUMLP  |  refused, "wanted gelu(...)"   ->   SiteChange(lost=True)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from liger_fx.engine.site import Site


@dataclass(frozen=True)
class SiteChange:
    """The sites of one rule in one module.

    before, after: the types of the named modules that stand there; None where none does.
    reason: why one is not rewritten after; None where all are, or where nothing was found.
    lost: whether fewer are rewritten than before.
    """

    rule: str
    path: str
    before: str | None
    after: str | None
    reason: str | None
    lost: bool


def changes(before: Iterable[Site], after: Iterable[Site]) -> tuple[SiteChange, ...]:
    """Every place at which other modules stand than before, the lost ones first."""
    old, new = _by_place(before), _by_place(after)
    found = []
    for rule, path in dict.fromkeys([*old, *new]):
        was, now = (_standing(sites.get((rule, path), [])) for sites in (old, new))
        if was != now:
            left = (site.reason for site in new.get((rule, path), []) if site.reason is not None)
            before_text, after_text = ", ".join(was) or None, ", ".join(now) or None
            lost = len(now) < len(was)
            found.append(SiteChange(rule, path, before_text, after_text, next(left, None), lost))
    return tuple(sorted(found, key=lambda change: not change.lost))


def _by_place(sites: Iterable[Site]) -> dict[tuple[str, str], list[Site]]:
    places: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        places.setdefault((site.rule, site.path), []).append(site)
    return places


def _standing(sites: list[Site]) -> list[str]:
    """The types of the named modules that stand there."""
    return sorted(site.after_class for site in sites if site.after_class is not None)
