"""The blocks as the page shows them: each kind in an article, the code of each graph once.

26 layers, alike but for one constant   ->   Article("Gemma2DecoderLayer", count=26, graphs=[
    Graph("model.layers.0,2,4", calls=(...), code="def forward(...", same_as=""), ...])
"""

from __future__ import annotations

from dataclasses import dataclass

from liger_fx.report.block_sections import block_kinds, where
from liger_fx.report.facts import Facts
from liger_fx.report.folding import fold


@dataclass(frozen=True)
class Graph:
    """The graph of the first kind of call of some blocks, and the kinds of calls that have one.

    same_as: where the same code is shown already; then ``code`` is empty.
    """

    where: str
    calls: tuple[str, ...]
    code: str
    same_as: str


@dataclass(frozen=True)
class Article:
    """Blocks of one kind."""

    class_name: str
    path: str
    count: int
    number: int
    graphs: tuple[Graph, ...]


def block_articles(diff: Facts) -> list[Article]:
    """One for each of ``block_kinds``."""
    shown: dict[str, str] = {}
    return [
        Article(
            rows[0].class_name,
            rows[0].paths[0] if rows[0].paths else "",
            sum(len(row.paths) for row in rows),
            sum(len(row.calls) for row in rows),
            tuple(
                _graph(where(group), group[0].calls, group[0].code.strip(), shown)
                for group in fold(rows, key=lambda row: (row.code, row.calls))
            ),
        )
        for rows in block_kinds(diff)
    ]


def _graph(place: str, calls: tuple[str, ...], code: str, shown: dict[str, str]) -> Graph:
    if code and code in shown:
        return Graph(place, calls, "", shown[code])
    shown[code] = place
    return Graph(place, calls, code, "")
