"""The facts of a report as titled tables and lists: what each face shows, each in its way.

Facts   ->   [Table("Rules", ("rule", "found", ...), [("rms_norm", 65, ...)]), ...]
"""

from __future__ import annotations

from collections.abc import Iterator

from liger_fx.engine.drawing import Cost
from liger_fx.report.amounts import ASSUMPTIONS, change, full_change, percent, totals
from liger_fx.report.block_sections import (
    block_table,
    blocks_line,
    fallback_table,
    fallbacks_line,
    graph_sections,
)
from liger_fx.report.changes import SiteChange
from liger_fx.report.facts import Facts
from liger_fx.report.folding import alike, fold, fold_paths, shape
from liger_fx.report.kinds import Kind, kinds, source_text
from liger_fx.report.listing import listing
from liger_fx.report.section import Cell, Lines, Section, Subgraph, Table
from liger_fx.report.tree import aligned, lines
from liger_fx.report.verified_sections import verdict, verified_sections

ALIKE = "what both have alike is left out"
LOST, CHANGED = "No longer rewritten", "Newly or otherwise rewritten"
_CHANGE = ("rule", "where", "sites", "before", "now", "why")
_MEMORY = ("where", "traffic", "change", "kept for backward", "change")


def sections(diff: Facts, full: bool = False) -> list[Section]:
    """Every section that has something to say; ``full`` folds no layers and lists each graph."""
    refused, rewritten = kinds(diff.refused, full), kinds(diff.rewritten, full)
    tree = aligned(diff.before.tree, diff.after.tree)
    modules = tuple((name or "model", *rest) for name, *rest in lines(tree, full))
    lost, other = (
        [change for change in diff.changes if change.lost is wanted] for wanted in (True, False)
    )
    found: list[Section] = [
        Table(LOST, _CHANGE, _changed(lost)),
        Table(CHANGED, _CHANGE, _changed(other)),
        Table("Rules", ("rule", "found", "rewritten", "refused"), rule_counts(diff)),
        Table("Refused", ("rule", "where", "sites", "why", "model code"), _refused(refused)),
        fallback_table(diff, full),
        Table("Sites", ("where", "sites", "in", "nodes before", "node after"), _sites(rewritten)),
        block_table(diff, full),
        Table("Memory, for one token", _MEMORY, _memory(diff, rewritten)),
        *(verified_sections(diff.verified) if diff.verified else ()),
        Lines("Opaque modules", diff.opaque),
        Table("Modules", ("module", "before", "after"), modules),
        *operator_counts(diff, full),
        *_subgraphs([*rewritten, *refused]),
        *(graph_sections(diff) if full else ()),
        Lines("Traced with", tuple(f"{name}: {text}" for name, text in diff.inputs.items())),
        Lines("The graph holds while", _guards(diff)),
        Lines("How bytes are counted", ASSUMPTIONS if _has_costs(diff) else ()),
        Lines("Versions", _versions(diff)),
    ]
    return [section for section in found if _says_something(section)]


def headline(diff: Facts) -> list[str]:
    """The main facts, a sentence each."""
    before, after = sum(diff.before.operators.values()), sum(diff.after.operators.values())
    operators, name = f"{before} -> {after} operators", diff.after.class_name
    if diff.versions_before:
        lost = len(diff.lost)
        said = [
            f"{name}: {lost} {'place is' if lost == 1 else 'places are'} no longer rewritten as "
            f"before, {len(diff.changes) - lost} changed otherwise, {operators}",
            f"in these tables {ALIKE}",
        ]
    else:
        count = f"{len(diff.rewritten)} site{'' if len(diff.rewritten) == 1 else 's'}"
        said = [f"{name}: {count} rewritten, {len(diff.refused)} refused, {operators}"]
    if diff.blocks:
        said.append(f"{blocks_line(diff)}; {fallbacks_line(diff)}")
    if diff.verified:
        said.append(f"verified: {verdict(diff.verified)}")
    if _has_costs(diff):
        a, b = totals(diff.rewritten)
        said.append(
            f"memory traffic of these sites {change(a.traffic, b.traffic)} a token "
            f"({percent(a.traffic, b.traffic)})"
        )
        said.append(
            f"kept for the backward pass {change(a.saved, b.saved)} a token "
            f"({percent(a.saved, b.saved)})"
        )
    return said


def _changed(found: list[SiteChange]) -> list[tuple[Cell, ...]]:
    alike_ones = fold(
        found, key=lambda c: (c.rule, shape(c.path), c.before, c.after, alike(c.reason or ""))
    )
    return [
        (
            c.rule,
            fold_paths(change.path for change in group),
            len(group),
            c.before or "-",
            c.after or "-",
            c.reason or ("" if c.after else "nothing like it is there any more"),
        )
        for group in alike_ones
        for c in group[:1]
    ]


def _versions(diff: Facts) -> tuple[str, ...]:
    now, before = (
        ", ".join(f"{name} {version}" for name, version in found.items())
        for found in (diff.versions, diff.versions_before)
    )
    return (f"before: {before}", f"now: {now}") if before else (now,)


def _says_something(section: Section) -> bool:
    if isinstance(section, Table):
        return bool(section.rows)
    return not isinstance(section, Lines) or any(section.lines)


def _has_costs(diff: Facts) -> bool:
    return any(site.drawing and site.drawing.cost_after for site in diff.rewritten)


def rule_counts(diff: Facts) -> list[tuple[Cell, ...]]:
    """(rule, sites found, rewritten, refused) for each rule that looked."""
    names = dict.fromkeys([*diff.rules, *(site.rule for site in diff.sites)])
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        done = sum(site.rule == name for site in diff.rewritten)
        left = sum(site.rule == name for site in diff.refused)
        rows.append((name, done + left, done, left))
    return rows


def _refused(refused: list[Kind]) -> list[tuple[Cell, ...]]:
    return [
        (k.example.rule, k.where, k.count, k.example.reason or "", source_text(k.example))
        for k in refused
    ]


def _sites(rewritten: list[Kind]) -> list[tuple[Cell, ...]]:
    return [
        (k.where, k.count, k.example.before_class, _nodes(k), k.example.after_class or "")
        for k in rewritten
    ]


def _nodes(kind: Kind) -> str:
    drawing = kind.example.drawing
    if drawing is None:
        return "; ".join(kind.example.before)
    boxes = (box for box in drawing.before if box.kind not in ("input", "parameter"))
    return ", ".join(box.label for box in boxes)


def _memory(diff: Facts, rewritten: list[Kind]) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for kind in rewritten:
        a, b = totals(kind.sites)
        if a.traffic.per_token or a.traffic.fixed:
            rows.append((kind.where, *_changes(a, b)))
    if len(rows) > 1:
        rows.append(("all together", *_changes(*totals(diff.rewritten))))
    return rows


def _changes(before: Cost, after: Cost) -> tuple[str, ...]:
    pairs = (before.traffic, after.traffic), (before.saved, after.saved)
    return tuple(text for a, b in pairs for text in (full_change(a, b), percent(a, b)))


def operator_counts(diff: Facts, full: bool) -> Iterator[Section]:
    """How many there are of each before and after; those unchanged in one line unless ``full``."""
    before, after = diff.before.operators, diff.after.operators
    names = sorted(before.keys() | after.keys(), key=lambda n: (-before.get(n, 0), n))
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        a, b = before.get(name, 0), after.get(name, 0)
        if a != b or full:
            rows.append((name, a, b, f"{b - a:+d}" if a != b else "="))
    same = [name for name in names if before.get(name) == after.get(name)]
    if len(same) == len(names) and not full:
        yield Lines("Operators", (f"the same {sum(before.values())} operators in both",))
        return
    if same and not full:
        kept = sum(before[name] for name in same)
        noun = "other kind" if len(same) == 1 else "other kinds"
        rows.append((f"{len(same)} {noun}, unchanged", kept, kept, "="))
    yield Table("Operators", ("operator", "before", "after", "change"), rows)


def _subgraphs(found: list[Kind]) -> Iterator[Subgraph]:
    for kind in found:
        site = kind.example
        if site.drawing is not None:
            what = f"{site.before_class} -> {site.after_class or 'refused'}"
            before, after = listing(site.drawing.before), listing(site.drawing.after)
            yield Subgraph(f"{what}: {kind.where}", before, after)


def _guards(diff: Facts) -> tuple[str, ...]:
    """Without those that say again what the inputs are."""
    told = {f"{name} is {text}" for name, text in diff.inputs.items()}
    return tuple(guard for guard in diff.guards if guard not in told)
