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
    """One place in the trees: what stands there before and after (None: nothing), and below.

    marks: whatever else tells it from other places, of which those alike fold.
    """

    before: str | None = None
    after: str | None = None
    marks: list[int] = field(default_factory=list)
    children: dict[str, Pair] = field(default_factory=dict)

    def signature(self) -> str:
        """Equal for two places exactly if everything in and below them is the same."""
        below = [(name, child.signature()) for name, child in self.children.items()]
        return repr((self.before, self.after, self.marks, below))

    def at(self, path: str) -> Pair:
        """The place at a path below this one, made if it is not there."""
        place = self
        for name in path.split(".") if path else ():
            place = place.children.setdefault(name, Pair())
        return place

    def groups(self) -> list[list[tuple[str, Pair]]]:
        """The children by name, alike members of a list together."""
        if not all(name.isdigit() for name in self.children):
            return [[item] for item in self.children.items()]
        return fold(self.children.items(), key=lambda item: item[1].signature())


def aligned(before: tuple[TreeRow, ...], after: tuple[TreeRow, ...]) -> Pair:
    """Both trees in one; a module that only one of them has keeps its place among its siblings."""
    root = Pair()
    for row in before:
        root.at(row.path).before = str(row)
    for row in after:
        root.at(row.path).after = str(row)
    return root


def lines(pair: Pair, full: bool, name: str = "", depth: int = 0) -> Iterator[tuple[str, ...]]:
    """(indented name, before, after) for each place; an unchanged place says "=" for after."""
    after = "=" if pair.before == pair.after else pair.after or ""
    yield "  " * depth + name, pair.before or "", after
    groups = [[item] for item in pair.children.items()] if full else pair.groups()
    for group in groups:
        names = numbers([name for name, _ in group])
        count = f" ({len(group)} x)" if len(group) > 1 else ""
        yield from lines(group[0][1], full, names + count, depth + 1)
