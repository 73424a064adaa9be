"""A GraphDiff as plain text, for a terminal or a log file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from tabulate import tabulate

from liger_fx.engine.site import Site
from liger_fx.report.facts import GraphDiff
from liger_fx.report.folding import alike, fold, fold_paths
from liger_fx.report.tree import aligned, lines

_CELL = 52


def render(diff: GraphDiff, full: bool = False) -> str:
    """Every section that has something to say, the verdict first; `full` folds no layers."""
    sections = [
        ("", _headline(diff)),
        ("Rules", _rules(diff)),
        ("Refused", _refused(diff, full)),
        ("Sites", _rewritten(diff, full)),
        ("Operators", _operators(diff)),
        ("Modules", _modules(diff, full)),
        ("Opaque modules", "\n".join(diff.opaque)),
        ("The graph holds while", "\n".join(diff.guards)),
        ("Versions", ", ".join(f"{name} {v}" for name, v in diff.versions.items())),
    ]
    return "\n\n".join(f"{title}\n{body}".strip("\n") for title, body in sections if body)


def _headline(diff: GraphDiff) -> str:
    before, after = sum(diff.before.operators.values()), sum(diff.after.operators.values())
    return (
        f"{diff.after.class_name}: {_count(len(diff.rewritten), 'site')} rewritten, "
        f"{len(diff.refused)} refused, {before} -> {after} operators"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(headers: Sequence[str], rows: list[tuple[object, ...]]) -> str:
    if not rows:
        return ""
    align = ["right" if isinstance(cell, int) else "left" for cell in rows[0]]
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _CELL, break_long_words=False, break_on_hyphens=False))


def _lines(paths: str) -> str:
    return paths.replace(", ", ",\n")


def _rules(diff: GraphDiff) -> str:
    names = dict.fromkeys([*diff.rules, *(site.rule for site in diff.sites)])
    rows: list[tuple[object, ...]] = []
    for name in names:
        done = sum(site.rule == name for site in diff.rewritten)
        left = sum(site.rule == name for site in diff.refused)
        rows.append((name, done + left, done, left))
    return _table(("rule", "found", "rewritten", "refused"), rows)


def _groups(sites: Sequence[Site], full: bool) -> Iterator[tuple[Site, str, int]]:
    """(an example, the paths, how many) for each kind of site; `full` gives one for each site."""
    if full:
        yield from ((site, site.path, 1) for site in sites)
        return
    for group in fold(sites, key=_kind):
        yield group[0], fold_paths(site.path for site in group), len(group)


def _kind(site: Site) -> tuple[str, ...]:
    parts = (*site.before, site.reason or "")
    return (site.rule, site.before_class, site.after_class or "", *(alike(part) for part in parts))


def _refused(diff: GraphDiff, full: bool) -> str:
    rows: list[tuple[object, ...]] = [
        (site.rule, _lines(paths), count, _wrap(site.reason or ""), _source(site))
        for site, paths, count in _groups(diff.refused, full)
    ]
    return _table(("rule", "where", "sites", "why", "model code"), rows)


def _rewritten(diff: GraphDiff, full: bool) -> str:
    rows: list[tuple[object, ...]] = [
        (_lines(paths), count, site.before_class, _wrap("; ".join(site.before)), site.after_class)
        for site, paths, count in _groups(diff.rewritten, full)
    ]
    return _table(("where", "sites", "in", "nodes before", "node after"), rows)


def _source(site: Site) -> str:
    if site.source is None:
        return ""
    file, line = site.source
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}"


def _operators(diff: GraphDiff) -> str:
    before, after = diff.before.operators, diff.after.operators
    names = sorted(before.keys() | after.keys(), key=lambda n: (-before.get(n, 0), n))
    rows: list[tuple[object, ...]] = []
    for name in names:
        a, b = before.get(name, 0), after.get(name, 0)
        if a != b:
            rows.append((name, a, b, f"{b - a:+d}"))
    same = [name for name in names if before.get(name) == after.get(name)]
    if same and not rows:
        return f"the same {sum(before.values())} operators in both"
    if same:
        kept = sum(before[name] for name in same)
        rows.append((f"{_count(len(same), 'other kind')}, unchanged", kept, kept, "="))
    return _table(("operator", "before", "after", "change"), rows)


def _modules(diff: GraphDiff, full: bool) -> str:
    tree = aligned(diff.before.tree, diff.after.tree)
    rows = [(name or "model", *rest) for name, *rest in lines(tree, full)]
    headers = ("module", "before", "after")
    return tabulate(rows, headers, disable_numparse=True, preserve_whitespace=True)
