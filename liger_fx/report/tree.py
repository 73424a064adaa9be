"""Two module trees, aligned line by line.

    layers.0.mlp  LlamaMLP  |  LigerSwiGLUMLP(64 -> 128, silu)

Neighbours in a list (layers.0, layers.1, ...) whose lines are the same on both sides fold into one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from liger_fx.report.facts import TreeRow
from liger_fx.report.folding import fold, numbers


@dataclass
class Pair:
    """One place in the trees: what stands there before and after (None: nothing), and below."""

    before: str | None = None
    after: str | None = None
    children: dict[str, Pair] = field(default_factory=dict)

    def signature(self) -> str:
        """Equal for two places exactly if everything in and below them is the same."""
        below = [(name, child.signature()) for name, child in self.children.items()]
        return repr((self.before, self.after, below))


def aligned(before: tuple[TreeRow, ...], after: tuple[TreeRow, ...]) -> Pair:
    """Both trees in one; a module that only one of them has keeps its place among its siblings."""
    root = Pair()
    for row in before:
        _at(root, row.path).before = str(row)
    for row in after:
        _at(root, row.path).after = str(row)
    return root


def _at(root: Pair, path: str) -> Pair:
    for name in path.split(".") if path else ():
        root = root.children.setdefault(name, Pair())
    return root


def lines(pair: Pair, full: bool, name: str = "", depth: int = 0) -> Iterator[tuple[str, ...]]:
    """(indented name, before, after) for each place; an unchanged place says "=" for after."""
    after = "=" if pair.before == pair.after else pair.after or ""
    yield "  " * depth + name, pair.before or "", after
    for names, child in _folded(pair, full):
        yield from lines(child, full, names, depth + 1)


def _folded(pair: Pair, full: bool) -> Iterator[tuple[str, Pair]]:
    """The children, alike members of a list as one, under a name that counts them."""
    if full or not all(name.isdigit() for name in pair.children):
        yield from pair.children.items()
        return
    for group in fold(pair.children.items(), key=lambda item: item[1].signature()):
        names = numbers([name for name, _ in group])
        yield (f"{names} ({len(group)} x)" if len(group) > 1 else names), group[0][1]
