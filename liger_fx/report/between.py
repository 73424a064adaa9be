"""The difference between any two of: a model, an optimised model, a saved graph, a report.

Subject(side, report of an older version)  |  Subject(side, report of now)   ->   GraphDiff
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from liger_fx.engine.site import Site
from liger_fx.report.changes import changes
from liger_fx.report.facts import Side
from liger_fx.report.graph_diff import GraphDiff
from liger_fx.report.kinds import kind_of


@dataclass(frozen=True)
class Subject:
    """One of the two things compared; ``report`` is None for what was not optimised."""

    side: Side
    report: GraphDiff | None

    @classmethod
    def of_report(cls, report: GraphDiff) -> Subject:
        """The optimised model that a report is about."""
        return cls(report.after, report)


def compare(a: Subject, b: Subject) -> GraphDiff:
    """From a to b. The sites, rules, inputs, guards and opaque modules are those of b's report.

    Where both are optimised, a site that both reports hold is no difference and is left out, and
    ``changes`` says what is rewritten in one alone.
    """
    if b.report is None:
        return GraphDiff(a.side, b.side)
    if a.report is None:
        return replace(b.report, before=a.side, after=b.side)
    known = set(map(_account, a.report.sites))
    return replace(
        b.report,
        before=a.side,
        after=b.side,
        sites=tuple(site for site in b.report.sites if _account(site) not in known),
        changes=changes(a.report.sites, b.report.sites),
        versions_before=a.report.versions,
    )


def _account(site: Site) -> Hashable:
    """What is said of a site, apart from the model's line and the numbers of nodes."""
    return site.path, site.after, kind_of(site)
