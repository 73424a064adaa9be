"""What was done to a model made of blocks, as one report.

each block's sites, counted for all blocks alike   ->   GraphDiff
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from liger_fx.engine.counts import count_operators
from liger_fx.engine.rule import discover
from liger_fx.engine.site import Site
from liger_fx.model.alike import told_once
from liger_fx.model.plan import Plan
from liger_fx.report.blocks import BlockRow
from liger_fx.report.facts import Side, tree_rows
from liger_fx.report.graph_diff import GraphDiff
from liger_fx.tracing.inner_blocks import is_block


def blocks_of(root: nn.Module) -> dict[str, Any]:
    """The blocks of a tree by path, the root first; one that hangs in two places, once."""
    return {path: m for path, m in root.named_modules() if is_block(m)}


def report_of(root: Any) -> GraphDiff:
    """Every site of every block, and the calls that no graph served."""
    planner = root._block.planner
    blocks = blocks_of(root)
    assert planner.original is not None
    first = root.plans[0] if root.plans else None
    before = Side(
        root.block_class.__name__, _operators(root, blocks, after=False), planner.original
    )
    return GraphDiff(
        before,
        side_of(root),
        tuple(_sites(blocks)),
        rules=tuple(rule.name for rule in discover()),
        inputs=first.guards.call.describe() if first else {},
        guards=tuple(first.guards.describe()) if first else (),
        opaque=tuple(_opaque(blocks)),
        verified=planner.verified,
        blocks=tuple(_rows(blocks)),
        fallbacks=tuple(planner.fallbacks),
    )


def side_of(root: Any) -> Side:
    """A model as it stands: its operators, counted over all blocks, and its tree."""
    return Side(
        root.block_class.__name__, _operators(root, blocks_of(root), after=True), tree_rows(root)
    )


def _operators(root: Any, blocks: dict[str, Any], *, after: bool) -> dict[str, int]:
    known: dict[tuple[int, int], Counter[str]] = {}

    def count(block: Any, number: int) -> Counter[str]:
        key = id(block._block.alike), number
        if key not in known:
            plan: Plan = block._block.alike.plans[number]
            own = count_operators(plan.graph, block) if after else plan.operators or {}
            total = Counter(own)
            for path, inner in plan.inner:
                total.update(count(block.get_submodule(path), inner))
            known[key] = total
        return known[key]

    if root.plans:
        total = count(root, root._block.alike.plans.index(root.plans[0]))
    else:
        total, counted = Counter(), list[str]()
        for path, block in blocks.items():
            if block.plans and not any(path.startswith(f"{outer}.") for outer in counted):
                counted.append(path)
                total.update(count(block, block._block.alike.plans.index(block.plans[0])))
    return dict(sorted(total.items()))


def _sites(blocks: dict[str, Any]) -> Iterator[Site]:
    for path, block in blocks.items():
        called = {f"call_module {path}" for plan in block.plans for path in plan.modules}
        # Also by graphs that serve no call any more, where those that do call what was put in.
        old = [s for s in block._block.alike.sites() if s.after in called or not block.plans]
        groups = [*(plan.sites for plan in block.plans), old]
        yield from (_below(site, path) for site in told_once(groups))


def _below(site: Site, path: str) -> Site:
    if not path:
        return site
    after = site.after and site.after.replace("call_module ", f"call_module {path}.", 1)
    return replace(site, path=f"{path}.{site.path}".rstrip("."), after=after)


def _opaque(blocks: dict[str, Any]) -> Iterator[str]:
    seen = set[str]()
    for path, block in blocks.items():
        for leaf in (leaf for plan in block.plans for leaf in plan.opaque):
            text = str(replace(leaf, path=f"{path}.{leaf.path}".lstrip(".")))
            if text not in seen:
                seen.add(text)
                yield text


def _rows(blocks: dict[str, Any]) -> Iterator[BlockRow]:
    groups: dict[int, list[str]] = {}
    for path, block in blocks.items():
        groups.setdefault(id(block._block.alike), []).append(path)
    for paths in groups.values():
        block = blocks[paths[0]]
        calls = tuple(
            ", ".join(f"{name} {text}" for name, text in plan.guards.call.describe().items())
            for plan in block.plans
        )
        code = block.code if block.plans else ""
        yield BlockRow(block.block_class.__name__, tuple(paths), calls, code)
