"""A report as one HTML file that needs nothing else: no network, no other file.

page/page.html is the page (Jinja2, every value escaped), page.css its looks, page.js what moves. A
browser runs and applies nothing but these two: their hashes stand in the page's own policy.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from liger_fx.engine.site import Site
from liger_fx.report.amounts import change, full_change, percent, totals
from liger_fx.report.block_articles import block_articles
from liger_fx.report.block_sections import (
    BLOCKS,
    FELL_BACK,
    block_kinds,
    blocks_line,
    fallbacks_line,
    graph_count,
)
from liger_fx.report.facts import Facts
from liger_fx.report.kinds import Kind, kinds, source_text
from liger_fx.report.layout import lay_out, lines_of
from liger_fx.report.listing import box_names, spec_text
from liger_fx.report.section import Section
from liger_fx.report.sections import (
    ALIKE,
    CHANGED,
    LOST,
    headline,
    operator_counts,
    rule_counts,
    sections,
)
from liger_fx.report.tree import Pair, aligned
from liger_fx.report.verified_sections import verdict

_NEGATIVE = re.compile(r"(?<![\w.])-(?=\d)")
_FOLDER = Path(__file__).parent / "page"
_LISTED = {  # the sections below the tree; the tree and the site's panel show the others
    "Rules", "Verified", "Relative L2 error against float64", "Each site against float64",
    "Not looked at by verify",
    "Traced with", "The graph holds while", "Opaque modules", "How bytes are counted", "Versions",
}  # fmt: skip


def render(diff: Facts) -> str:
    """The page. Alike sites and modules stand in it once, with the list of their paths."""
    found = [*kinds(diff.refused), *kinds(diff.rewritten)]
    shown = sections(diff)
    style, script = (_source(name) for name in ("page.css", "page.js"))
    return _template().render(
        diff=diff,
        alike=ALIKE,
        headline=headline(diff)[0],
        operators=[sum(side.operators.values()) for side in (diff.before, diff.after)],
        totals=totals(diff.rewritten),
        rules=rule_counts(diff),
        kinds=found,
        sections=[
            *(section for section in shown if section.title in _LISTED),
            *operator_counts(diff, full=True),
        ],
        changed=[s for s in shown if s.title in (LOST, CHANGED)],
        block_sections=[s for s in shown if s.title in (FELL_BACK, BLOCKS)],
        blocks=block_articles(diff),
        graph_count=graph_count(diff),
        blocks_line=blocks_line(diff),
        fallbacks_line=fallbacks_line(diff),
        data=_data(diff, found),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        box_names=box_names, change=change, full_change=full_change, lay_out=lay_out,
        lines_of=lines_of, percent=percent, rows_of=_rows, source_text=source_text,
        spec_text=spec_text, totals_of=totals, verdict=verdict,
    )  # fmt: skip
    environment.filters["box_name"] = lambda place, names: names[place]
    environment.filters["printed"] = _printed
    return environment.get_template("page.html")


def _printed(value: str | int) -> str | int:
    """Amounts with the arrow and the minus sign of print."""
    if isinstance(value, int):
        return value
    return _NEGATIVE.sub("\N{MINUS SIGN}", value.replace("->", "\N{RIGHTWARDS ARROW}"))


@cache
def _source(name: str) -> Markup:
    """A file that goes into the page as it is."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _hash(text: str) -> Markup:
    """The name under which a policy lets a browser take this inline text."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")


def _rows(section: Section) -> Any:
    """A table's rows; None for a section of sentences."""
    return getattr(section, "rows", None)


def _data(diff: Facts, found: list[Kind]) -> dict[str, Any]:
    """What the script needs: the tree, the kinds of sites, and what verify found at each."""
    tree = aligned(diff.before.tree, diff.after.tree)
    for i, kind in enumerate(found):
        for site in kind.sites:
            for path in dict.fromkeys((site.path, _mounted(site) or site.path)):
                tree.at(path).marks.append(i)
    for i, rows in enumerate(block_kinds(diff)):
        for path in (path for row in rows for path in row.paths):
            tree.at(path).marks.append(len(found) + i)
    return {
        "tree": _node(tree, ["model"], len(found)),
        "kinds": [
            {
                "rule": kind.example.rule,
                "refused": kind.example.reason is not None,
                "text": _words(kind),
                "paths": [site.path for site in kind.sites],
            }
            for kind in found
        ],
        "verified": _checks(diff),
    }


def _checks(diff: Facts) -> dict[str, str]:
    """What verify found, by the module's path and by that of the site."""
    found = {
        check.path: check.fault
        or f"outputs {_ratio(check.outputs)}, gradients "
        f"{_ratio(check.gradients)} the original's error"
        for check in (diff.verified.sites if diff.verified else ())
    }
    mounted = {site.path: _mounted(site) for site in diff.rewritten}
    return found | {path: found[module] for path, module in mounted.items() if module in found}


def _mounted(site: Site) -> str:
    """The path of the named module that stands at a site."""
    return (site.after or "").removeprefix("call_module ")


def _ratio(measured: Any) -> str:
    return "-" if measured is None or measured.ratio is None else f"{measured.ratio:.2f} x"


def _words(kind: Kind) -> str:
    """What a search finds a kind of site by, beside its modules."""
    site = kind.example
    return " ".join(filter(None, (site.rule, site.before_class, site.after_class, site.reason)))


def _node(pair: Pair, names: list[str], sites: int) -> dict[str, Any]:
    """A place in the tree, or several alike ones: their names, and all that they have in common.

    sites: the number of kinds of sites; the marks from there on are of kinds of blocks.
    """
    return {
        "names": names,
        "before": pair.before,
        "after": pair.after,
        "kinds": [mark for mark in pair.marks if mark < sites],
        "block": next((mark - sites for mark in pair.marks if mark >= sites), None),
        "below": [
            _node(group[0][1], [name for name, _ in group], sites) for group in pair.groups()
        ],
    }
