"""The blocks of a model as sections of a report, and the calls that no graph served.

BlockRow("LlamaDecoderLayer", ("model.layers.0", ..., "model.layers.127"), ("hidden_states ...",))
 ->
class              where               graphs  calls
LlamaDecoderLayer  model.layers.0-127       1  hidden_states, attention_mask, ...
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from liger_fx.report.blocks import BlockRow, FallbackRow
from liger_fx.report.calls import short_calls
from liger_fx.report.facts import Facts
from liger_fx.report.folding import ROOT, alike, fold, fold_paths, shape
from liger_fx.report.section import Cell, Subgraph, Table

BLOCKS, FELL_BACK = "Blocks", "Calls that no graph served"


def block_table(diff: Facts, full: bool) -> Table:
    """Alike blocks in a row; with ``full``, a row for each graph, and what it is given."""
    rows = [r for row in diff.blocks for r in _calls(row)] if full else map(_row, block_kinds(diff))
    return Table(BLOCKS, ("class", "where", "graphs", "calls"), list(rows))


def block_kinds(diff: Facts) -> list[list[BlockRow]]:
    """The blocks by kind: of one class, in like places, called in like ways."""
    return fold(diff.blocks, key=lambda row: (row.class_name, _shapes(row), short_calls(row.calls)))


def _shapes(row: BlockRow) -> frozenset[str]:
    return frozenset(map(shape, row.paths))


def _row(rows: list[BlockRow]) -> tuple[Cell, ...]:
    count = sum(len(row.calls) for row in rows)
    return rows[0].class_name, where(rows), count, short_calls(rows[0].calls)


def _calls(row: BlockRow) -> Iterator[tuple[Cell, ...]]:
    count = len(row.calls)
    for i, call in enumerate(row.calls or (short_calls(()),)):
        number = f"{i + 1} of {count}" if count > 1 else count
        yield row.class_name, where([row]), number, call


def where(rows: list[BlockRow]) -> str:
    """The places of blocks, folded; the root is "the model"."""
    return fold_paths(path or ROOT for row in rows for path in row.paths)


def fallback_table(diff: Facts, full: bool) -> Table:
    """The calls that the model's own code served; alike ones of alike places in a row."""
    rows = [
        (
            fold_paths(f.path or ROOT for f in group),
            group[0].class_name,
            group[0].call or "by position",
            group[0].reason,
        )
        for group in fold(diff.fallbacks, key=lambda f: f if full else _shape(f))
    ]
    return Table(FELL_BACK, ("where", "in", "call", "why"), rows)


def _shape(f: FallbackRow) -> Hashable:
    return shape(f.path), f.class_name, f.call, alike(f.reason)


def graphs(diff: Facts) -> list[tuple[list[BlockRow], str]]:
    """The code of each distinct graph, once, with the blocks that have it."""
    with_code = [row for row in diff.blocks if row.code.strip()]
    return [(rows, rows[0].code.strip()) for rows in fold(with_code, key=lambda row: row.code)]


def graph_sections(diff: Facts) -> Iterator[Subgraph]:
    """That code as listings."""
    for rows, code in graphs(diff):
        names = ", ".join(dict.fromkeys(row.class_name for row in rows))
        lines = [(line, "") for line in code.split("\n")]
        yield Subgraph(f"Graph of {names}: {where(rows)}", lines, [])


def graph_count(diff: Facts) -> int:
    """How many graphs there are: one for each kind of call of alike blocks."""
    return sum(len(row.calls) for row in diff.blocks)


def fallbacks_line(diff: Facts) -> str:
    """How many calls fell back, in words."""
    count = len(diff.fallbacks)
    if not count:
        return "no call fell back to the model's own code"
    return f"{count} call{'' if count == 1 else 's'} fell back to the model's own code"


def blocks_line(diff: Facts) -> str:
    """How many graphs serve how many blocks."""
    count, blocks = graph_count(diff), sum(len(row.paths) for row in diff.blocks)
    return (
        f"{count} distinct graph{'' if count == 1 else 's'} for {blocks} "
        f"block{'' if blocks == 1 else 's'}"
    )
