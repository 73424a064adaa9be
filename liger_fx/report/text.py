"""A GraphDiff as plain text for a log file or, with colours, for a terminal."""

from __future__ import annotations

import textwrap

from tabulate import tabulate

from liger_fx.report.facts import GraphDiff
from liger_fx.report.sections import LOST, Cell, Lines, Section, Subgraph, headline, sections

_CELL = 52
_BOLD, _DIM, _GREEN, _YELLOW = "1", "2", "1;32", "1;33"


def render(diff: GraphDiff, full: bool = False, color: bool = False) -> str:
    """Every section, the main facts first; ``full`` folds no layers, ``color`` is for terminals."""
    good = diff.rewritten and not diff.refused and (diff.verified is None or diff.verified.ok)
    first, *rest = headline(diff)
    parts = ["\n".join([_styled(first, _GREEN if good else _YELLOW, color), *rest])]
    for section in sections(diff, full):
        style = _YELLOW if section.title in (LOST, "Refused") else _BOLD
        parts.append(f"{_styled(section.title, style, color)}\n{_body(section, color)}")
    return "\n\n".join(parts)


def _styled(text: str, style: str, color: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if color else text


def _body(section: Section, color: bool) -> str:
    if isinstance(section, Lines):
        return "\n".join(textwrap.fill(line, 100) for line in section.lines)
    if isinstance(section, Subgraph):
        return _subgraph(section, color)
    cells = [
        [_cell(cell, section.headers[i]) for i, cell in enumerate(row)] for row in section.rows
    ]
    align = ["right" if isinstance(cell, int) else "left" for cell in section.rows[0]]
    return tabulate(
        cells, section.headers, disable_numparse=True, colalign=align, preserve_whitespace=True
    )


def _cell(cell: Cell, header: str) -> str:
    """Paths one a line, words wrapped; the names of a module tree keep their indentation."""
    text = str(cell)
    if header == "where":
        return text.replace(", ", ",\n")
    if text.startswith(" ") or len(text) <= _CELL:
        return text
    return "\n".join(textwrap.wrap(text, _CELL, break_long_words=False, break_on_hyphens=False))


def _subgraph(section: Subgraph, color: bool) -> str:
    rows = [*section.before, *section.after]
    width = max(len(text) for text, _ in rows)

    def block(lines: list[tuple[str, str]]) -> list[str]:
        return [f"    {t.ljust(width)}  {_styled(spec, _DIM, color)}".rstrip() for t, spec in lines]

    arrow = ["  ->"] if section.after else []
    return "\n".join([*block(section.before), *arrow, *block(section.after)])
