"""A report as plain text for a log file or, with colours, for a terminal.

Facts   ->   LlamaForCausalLM: 9 sites rewritten, 0 refused, 144 -> 75 operators

             Rules
             rule        found    rewritten    refused
             --------  -------  -----------  ---------
             rms_norm        5            5          0
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from tabulate import tabulate

from liger_fx.report.block_sections import FELL_BACK
from liger_fx.report.facts import Facts
from liger_fx.report.fitting import fitted
from liger_fx.report.section import Lines, Section, Subgraph, Table
from liger_fx.report.sections import LOST, headline, sections

_WIDTH, _SCREEN = 100, 50  # columns a line should keep to; lines that a reader sees at once
_BOLD, _DIM, _GREEN, _YELLOW, _RED = "1", "2", "32", "33", "31"
_GOOD, _WARNING = f"{_BOLD};{_GREEN}", f"{_BOLD};{_YELLOW}"

_Paint = Callable[[str, str], str]


def render(diff: Facts, full: bool = False, color: bool = False) -> str:
    """Every section, the main facts first, and again at the end of what fills more than a screen.

    ``full`` folds no layers, adds the settings of modules that did not change and the code of each
    graph; ``color`` is for terminals.
    """
    paint = _painted if color else _plain
    good = diff.rewritten and not (diff.refused or diff.lost)
    proven = diff.verified is None or diff.verified.ok
    first, *rest = headline(diff)
    head = "\n".join([paint(first, _GOOD if good and proven else _WARNING), *rest])
    parts = [head]
    for section in sections(diff, full):
        title = textwrap.fill(section.title, _WIDTH, subsequent_indent="    ")
        style = _WARNING if section.title in (LOST, FELL_BACK, "Refused") else _BOLD
        parts.append(f"{paint(title, style)}\n{_body(section, full, paint)}")
    whole = "\n\n".join(parts)
    return f"{whole}\n\n{head}" if whole.count("\n") > _SCREEN else whole


def _plain(text: str, style: str) -> str:
    return text


def _painted(text: str, style: str) -> str:
    """Each line for itself, as the lines of a cell are put beside those of other cells."""
    if not style:
        return text
    return "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def _body(section: Section, full: bool, paint: _Paint) -> str:
    if isinstance(section, Lines):
        return "\n".join(textwrap.fill(line, _WIDTH) for line in section.lines)
    if isinstance(section, Subgraph):
        return _subgraph(section, paint)
    return _table(section, full, paint)


def _table(table: Table, full: bool, paint: _Paint) -> str:
    rows = [[str(cell) for cell in row] for row in table.rows]
    if table.title == "Modules" and not full:
        rows = [_short(*row) for row in rows]
    cells = [
        [paint(text, _style(header, text)) for header, text in zip(table.headers, row, strict=True)]
        for row in fitted(table.headers, rows, _WIDTH)
    ]
    if table.headers[-1] == "":  # a verdict
        for row in cells:
            row[-1] = paint(row[-1], _GREEN if row[-1] == "ok" else _RED)
    align = ["right" if isinstance(cell, int) else "left" for cell in table.rows[0]]
    return tabulate(
        cells, table.headers, disable_numparse=True, colalign=align, preserve_whitespace=True
    )


def _short(name: str, before: str, after: str) -> list[str]:
    """A line of the module tree; a module that did not change is told by its type alone."""
    return [name, before.partition("(")[0] if after == "=" else before, after]


def _style(header: str, text: str) -> str:
    """The colour of a cell, by what stands in its column."""
    if text in ("=", "0", "-"):
        return _DIM
    if header in ("rewritten", "node after", "after", "now"):
        return _GREEN
    return _YELLOW if header in ("refused", "why") else ""


def _subgraph(section: Subgraph, paint: _Paint) -> str:
    def block(rows: list[tuple[str, str]]) -> list[str]:
        width = max(len(text) for text, _ in rows)
        return [f"  {text.ljust(width)}  {paint(spec, _DIM)}".rstrip() for text, spec in rows]

    after = ["->", *block(section.after)] if section.after else []
    return "\n".join([*block(section.before), *after])
