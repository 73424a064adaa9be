"""Many alike lines into one.

    model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp   ->  model.layers.0-2.mlp

Numbers that stand between dots are places in a list; lines that differ only there are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from itertools import product
from typing import TypeVar

Item = TypeVar("Item")
ROOT = "the model"  # what its empty path is called

_NODE_NUMBER = re.compile(r"(?<=[A-Za-z])_\d+\b")
_LIST_PLACES = re.compile(r"(?<=[A-Za-z_])(?:\.\d+)+\b")


def alike(text: str) -> str:
    """`text` without what differs from layer to layer: list places and the numbers of nodes."""
    return _NODE_NUMBER.sub("", _LIST_PLACES.sub(".*", text))


def shape(path: str) -> str:
    """A module path without its list places."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def fold(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups of equal keys, in the order in which each group first appears."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def fold_paths(paths: Iterable[str]) -> str:
    """Module paths as few as can say it: `model.layers.0-2,5.mlp`, else a list with commas."""
    by_shape = fold(dict.fromkeys(paths), key=shape)
    return ", ".join(text for group in by_shape for text in _fold_one_shape(group))


def _fold_one_shape(paths: list[str]) -> list[str]:
    """Paths that differ only in numbers: one text if every combination occurs, else several."""
    parts = [path.split(".") for path in paths]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    if set(product(*columns)) == {tuple(part) for part in parts}:
        return [".".join(numbers(column) for column in columns)]
    place = next(i for i, column in enumerate(columns) if len(column) > 1)
    groups = fold(paths, key=lambda path: path.split(".")[place])
    return [text for group in groups for text in _fold_one_shape(group)]


def numbers(texts: list[str]) -> str:
    """Whole numbers as ranges (`0-2,5`); a single text of any kind as it is."""
    if len(texts) == 1:
        return texts[0]
    runs: list[tuple[int, int]] = []
    for number in sorted(map(int, texts)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
