"""Where the boxes and arrows of a drawing go: layers from top to bottom, arrows that cross little.

    x     weight
    |       |        Layout(width, height, places=[Place(x, y, w, h), ...],
    pow     |               arrows=[Arrow(0, 1, [(60, 40), (60, 66)]), ...])
     \\     /
      mul

The method is Sugiyama's (1981): layers by longest path, a point in each layer that a long arrow
passes, the order by the mean place of the neighbours, then places as near to them as there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from liger_fx.engine.drawing import Box

_LETTER, _SMALL_LETTER = 7.3, 6.1  # widths of the two monospaced letters, at 12 and 10 pixels
_PADDING, _GAP, _LAYER_GAP, _MARGIN = 22.0, 18.0, 30.0, 2.0
_FIRST_LINE, _LINE, _BOTTOM = 17.0, 13.0, 9.0
_SWEEPS = 12


@dataclass(frozen=True)
class Place:
    """A box's rectangle; x and y are its upper left corner."""

    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True)
class Arrow:
    """From one box to another that reads it, through points of which the last is its head."""

    source: int
    target: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Layout:
    """A drawing's size, and the places of its boxes in their order."""

    width: float
    height: float
    places: tuple[Place, ...]
    arrows: tuple[Arrow, ...]


@dataclass
class _Item:
    """A box, or a point (``box`` is None) that a long arrow passes."""

    box: int | None
    width: float
    layer: int
    above: list[_Item] = field(default_factory=list)
    below: list[_Item] = field(default_factory=list)
    x: float = 0.0  # of its middle


def lay_out(boxes: Sequence[Box]) -> Layout:
    """The layout of boxes each of which reads only earlier ones."""
    depth = _depths(boxes)
    items = [_Item(i, width_of(box), depth[i]) for i, box in enumerate(boxes)]
    ways = {
        (source, target): _connect(items[source], items[target])
        for target, box in enumerate(boxes)
        for source in dict.fromkeys(box.reads)
    }
    layers: list[list[_Item]] = [[] for _ in range(max(depth, default=0) + 1)]
    for item in [*items, *(point for way in ways.values() for point in way)]:
        layers[item.layer].append(item)
    _order(layers)
    _space(layers)
    return _drawn(boxes, items, ways, layers)


def lines_of(box: Box) -> list[tuple[str, str]]:
    """What is written in a box, a line each: what the line is, and its text."""
    lines = [("label", box.label)]
    if box.detail:
        lines.append(("detail", box.detail if len(box.detail) <= 34 else box.detail[:33] + "…"))
    if box.dtype is not None and box.shape is not None:
        lines += [("spec", box.dtype), ("spec", f"[{', '.join(map(str, box.shape))}]")]
    return lines


def width_of(box: Box) -> float:
    """Wide enough for its lines."""
    widths = [
        len(text) * (_LETTER if what == "label" else _SMALL_LETTER) for what, text in lines_of(box)
    ]
    return max([*widths, 40.0]) + _PADDING


def height_of(box: Box) -> float:
    """High enough for them."""
    return _FIRST_LINE + _LINE * (len(lines_of(box)) - 1) + _BOTTOM


def _depths(boxes: Sequence[Box]) -> list[int]:
    """The layer of each box: below all that it reads, and what reads nothing next to its reader."""
    depth = [0] * len(boxes)
    readers: list[list[int]] = [[] for _ in boxes]
    for i, box in enumerate(boxes):
        depth[i] = max((depth[place] + 1 for place in box.reads), default=0)
        for place in box.reads:
            readers[place].append(i)
    for i in reversed(range(len(boxes))):
        if not boxes[i].reads and readers[i]:
            depth[i] = min(depth[reader] for reader in readers[i]) - 1
    top = min(depth, default=0)
    return [d - top for d in depth]


def _connect(source: _Item, target: _Item) -> list[_Item]:
    """The points of an arrow between, and everything linked to its neighbours."""
    points = [_Item(None, 8.0, layer) for layer in range(source.layer + 1, target.layer)]
    way = [source, *points, target]
    for upper, lower in zip(way, way[1:], strict=False):
        upper.below.append(lower)
        lower.above.append(upper)
    return points


def _order(layers: list[list[_Item]]) -> None:
    """Sort each layer by the mean place of the neighbours, from the top and from the bottom."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        place = {id(item): i for layer in layers for i, item in enumerate(layer)}
        for layer in layers if down else reversed(layers):
            mean = {
                id(item): fmean([place[id(n)] for n in near] or [place[id(item)]])
                for item in layer
                for near in [item.above if down else item.below]
            }
            layer.sort(key=lambda item: mean[id(item)])
            place.update((id(item), i) for i, item in enumerate(layer))


def _space(layers: list[list[_Item]]) -> None:
    """Give each item a middle as near to its neighbours' as those beside it leave room for."""
    for layer in layers:
        _spread(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            near = [item.above + item.below for item in layer]
            _spread(
                layer,
                [
                    fmean([n.x for n in ns]) if ns else item.x
                    for item, ns in zip(layer, near, strict=True)
                ],
            )


def _spread(layer: list[_Item], wanted: list[float]) -> None:
    """The middles that differ least, in squares, from the wanted ones, in order and apart.

    Neighbours that would overlap become one block, at the mean of what its members want (pool
    adjacent violators).
    """
    offsets = [0.0]
    for left, right in zip(layer, layer[1:], strict=False):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + _GAP)
    blocks: list[list[float]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        blocks.append([want - offset])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    starts = [fmean(block) for block in blocks for _ in block]
    for item, start, offset in zip(layer, starts, offsets, strict=True):
        item.x = start + offset


def _drawn(
    boxes: Sequence[Box],
    items: list[_Item],
    ways: dict[tuple[int, int], list[_Item]],
    layers: list[list[_Item]],
) -> Layout:
    every = [item for layer in layers for item in layer]
    left = min((item.x - item.width / 2 for item in every), default=0.0) - _MARGIN
    right = max((item.x + item.width / 2 for item in every), default=0.0) + _MARGIN
    heights = [
        max((height_of(boxes[item.box]) for item in layer if item.box is not None), default=0.0)
        for layer in layers
    ]
    tops = [_MARGIN + sum(heights[:i]) + i * _LAYER_GAP for i in range(len(layers))]
    places = tuple(
        Place(
            round(i.x - i.width / 2 - left, 1),
            round(tops[i.layer], 1),
            round(i.width, 1),
            height_of(b),
        )
        for i, b in zip(items, boxes, strict=True)
    )
    arrows = []
    for (source, target), points in ways.items():
        a, b = places[source], places[target]
        between = [  # straight down past the boxes of its layer
            (round(point.x - left, 1), tops[point.layer] + down)
            for point in points
            for down in (0.0, heights[point.layer])
        ]
        start, end = (a.x + a.w / 2, a.y + a.h), (b.x + b.w / 2, b.y)
        arrows.append(Arrow(source, target, (start, *between, end)))
    return Layout(round(right - left, 1), tops[-1] + heights[-1] + _MARGIN, places, tuple(arrows))
