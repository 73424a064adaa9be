"""What was done to a model made of blocks, as one report.

each block's sites, counted for all blocks alike   ->   GraphDiff
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from liger_fx.engine.counts import count_operators
from liger_fx.engine.rule import discover
from liger_fx.engine.site import Site
from liger_fx.model.alike import told_once
from liger_fx.model.plan import Plan
from liger_fx.report.blocks import BlockRow
from liger_fx.report.facts import Side, TreeRow
from liger_fx.report.graph_diff import GraphDiff
from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.walk import modules_by_path


def blocks_of(root: nn.Module) -> dict[str, Any]:
    """The blocks of a tree by path, the root first; one that hangs in two places, once."""
    return {path: m for path, m in modules_by_path(root).items() if is_block(m)}


def report_of(root: Any) -> GraphDiff:
    """Every site of every block, and the calls that no graph served."""
    planner = root._block.planner
    served = _served(root)
    assert planner.original is not None
    first = next(iter(served[0].plans), None)
    name = root.block_class.__name__
    return GraphDiff(
        Side(name, _operators(served, after=False), planner.original),
        Side(name, _operators(served, after=True), tree_rows(root)),
        tuple(_sites(served)),
        rules=tuple(rule.name for rule in discover()),
        inputs=first.guards.call.describe() if first else {},
        guards=tuple(first.guards.describe()) if first else (),
        opaque=tuple(_opaque(served)),
        verified=planner.verified,
        blocks=tuple(_rows(served)),
        fallbacks=tuple(planner.fallbacks),
    )


def sites_of(root: Any) -> tuple[Site, ...]:
    """Every site of every block of a model that nobody touched since its plans were made."""
    return tuple(
        _sites(_Served(path, b, b._block.plans_here(b)) for path, b in blocks_of(root).items())
    )


def side_of(root: Any) -> Side:
    """A model as it stands: its operators, counted over all blocks, and its tree."""
    operators = _operators(_served(root), after=True)
    return Side(root.block_class.__name__, operators, tree_rows(root))


def tree_rows(root: nn.Module) -> tuple[TreeRow, ...]:
    """The module tree as it is now."""
    return tuple(
        TreeRow(path, type(module).__name__, _detail(module))
        for path, module in modules_by_path(root, every_place=True).items()
    )


def _detail(module: nn.Module) -> str:
    if type(module).extra_repr is nn.Module.extra_repr:
        return ""
    return " ".join(module.extra_repr().split())


class _Served(NamedTuple):
    """A block at its path, and its graphs that serve calls."""

    path: str
    block: Any
    plans: list[Plan]


def _served(root: Any) -> list[_Served]:
    """The blocks from ``root`` down, itself the first."""
    return [_Served(path, block, block.plans) for path, block in blocks_of(root).items()]


def _operators(served: list[_Served], *, after: bool) -> dict[str, int]:
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

    total, counted = Counter[str](), list[str]()
    for path, block, plans in served:
        if plans and not any(_is_below(path, outer) for outer in counted):
            counted.append(path)
            total.update(count(block, block._block.alike.plans.index(plans[0])))
    return dict(sorted(total.items()))


def _is_below(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


def _sites(served: Iterable[_Served]) -> Iterator[Site]:
    for path, block, plans in served:
        called = {f"call_module {path}" for plan in plans for path in plan.modules}
        # Also by graphs that serve no call any more, where those that do call what was put in.
        old = [s for s in block._block.alike.sites() if s.after in called or not plans]
        groups = [*(plan.sites for plan in plans), old]
        yield from (_below(site, path) for site in told_once(groups))


def _below(site: Site, path: str) -> Site:
    if not path:
        return site
    after = site.after and site.after.replace("call_module ", f"call_module {path}.", 1)
    return replace(site, path=f"{path}.{site.path}".rstrip("."), after=after)


def _opaque(served: list[_Served]) -> Iterator[str]:
    seen = set[str]()
    for path, _, plans in served:
        for leaf in (leaf for plan in plans for leaf in plan.opaque):
            text = str(replace(leaf, path=f"{path}.{leaf.path}".lstrip(".")))
            if text not in seen:
                seen.add(text)
                yield text


def _rows(served: list[_Served]) -> Iterator[BlockRow]:
    groups: dict[int, list[_Served]] = {}
    for one in served:
        groups.setdefault(id(one.block._block.alike), []).append(one)
    for group in groups.values():
        _, block, plans = group[0]
        calls = tuple(
            ", ".join(f"{name} {text}" for name, text in plan.guards.call.describe().items())
            for plan in plans
        )
        code = block.code if plans else ""
        yield BlockRow(block.block_class.__name__, tuple(one.path for one in group), calls, code)
