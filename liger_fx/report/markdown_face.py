"""A report as Markdown for GitHub: tables, with everything long folded away.

Table("Rules", ("rule", "found"), [("rms_norm", 5)])   ->   | rule | found |
                                                            | :--- | ---: |
                                                            | rms_norm | 5 |
"""

from __future__ import annotations

import html
import re

from liger_fx.report.block_sections import BLOCKS, FELL_BACK
from liger_fx.report.facts import Facts
from liger_fx.report.section import Cell, Section, Subgraph, Table
from liger_fx.report.sections import CHANGED, LOST, headline, sections

_IN_SIGHT = {
    LOST, CHANGED, FELL_BACK, BLOCKS,
    "Rules", "Refused", "Sites", "Memory, for one token", "Verified",
}  # fmt: skip
# What Markdown takes for markup; an underscore inside a word is none.
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render(diff: Facts, full: bool = False) -> str:
    """Every section; ``full`` folds no layers into one."""
    first, *rest = headline(diff)
    parts = [
        f"## {_escaped(first)}",
        *(f"{_escaped(line[:1].upper() + line[1:])}." for line in rest),
    ]
    return "\n\n".join([*parts, *map(_section, sections(diff, full))]) + "\n"


def _section(section: Section) -> str:
    body = _body(section)
    if section.title in _IN_SIGHT:
        return f"### {section.title}\n\n{body}"
    return (
        f"<details><summary>{_inert(html.escape(section.title))}</summary>\n\n{body}\n\n</details>"
    )


def _body(section: Section) -> str:
    if isinstance(section, Table):
        return _table(section)
    if isinstance(section, Subgraph):
        return _subgraph(section)
    return "\n".join(f"- {_escaped(line)}" for line in section.lines)


def _table(table: Table) -> str:
    rules = ["---:" if isinstance(cell, int) else ":---" for cell in table.rows[0]]
    rows = [map(_escaped, table.headers), rules, *(map(_cell, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: Cell) -> str:
    text = str(cell)
    indent = len(text) - len(text.lstrip(" "))
    return "&nbsp;" * indent + _escaped(text.lstrip(" "))


def _subgraph(section: Subgraph) -> str:
    width = max(len(text) for text, _ in (*section.before, *section.after))
    before, after = (
        [f"{text.ljust(width)}  {spec}".rstrip() for text, spec in rows]
        for rows in (section.before, section.after)
    )
    lines = [*before, *(["->"] if after else []), *after]
    fence = "`" * max(3, 1 + max(len(run) for run in re.findall("`*", "\n".join(lines))))
    return "\n".join([f"{fence}text", *lines, fence])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no link and no mention."""
    one_line = " ".join(text.split())
    plain = one_line.replace("&", "&amp;").replace("<", "&lt;")
    return _inert(_MARKUP.sub(lambda found: "\\" + found[0], plain))


def _inert(text: str) -> str:
    """No link and no mention comes of it, in HTML nor in Markdown."""
    return re.sub(r"[@#]|:(?=//)", lambda found: f"&#{ord(found[0])};", text)
