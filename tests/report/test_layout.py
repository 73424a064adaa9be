"""A drawing's boxes never overlap, arrows go down, and none passes behind a box."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

import liger_fx
from liger_fx.engine.drawing import Box
from liger_fx.report.layout import Layout, lay_out
from liger_fx.tiny import tiny_model


@st.composite
def drawings(draw: st.DrawFn) -> tuple[Box, ...]:
    boxes = []
    for i in range(draw(st.integers(1, 16))):
        reads = tuple(draw(st.lists(st.integers(0, i - 1), max_size=3))) if i else ()
        shape = draw(st.none() | st.just(("batch", 8)))
        label = "o" * draw(st.integers(1, 20))
        boxes.append(Box("operator", label, "", shape and "float32", shape, reads, False))
    return tuple(boxes)


def check(boxes: tuple[Box, ...], layout: Layout) -> None:
    for a, b in combinations(layout.places, 2):
        apart = a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y
        assert apart, (a, b)
    for p in layout.places:
        assert p.x >= 0 and p.x + p.w <= layout.width and p.y >= 0 and p.y + p.h <= layout.height
    wanted = {(source, i) for i, box in enumerate(boxes) for source in box.reads}
    assert {(arrow.source, arrow.target) for arrow in layout.arrows} == wanted
    for arrow in layout.arrows:
        heights = [y for _, y in arrow.points]
        assert heights == sorted(heights) and heights[0] < heights[-1]
        for x, y in arrow.points[1:-1]:
            assert not any(p.x <= x <= p.x + p.w and p.y < y < p.y + p.h for p in layout.places)


@settings(max_examples=200, deadline=None)
@given(drawings())
def test_any_drawing(boxes: tuple[Box, ...]) -> None:
    check(boxes, lay_out(boxes))


def test_the_drawings_of_a_model_and_that_they_are_narrow() -> None:
    report = liger_fx.optimize(tiny_model("glm4", 1)).report
    assert report is not None
    for site in report.sites:
        assert site.drawing is not None
        layout = lay_out(site.drawing.before)
        check(site.drawing.before, layout)
        assert layout.width < 1200


def test_a_chain_stands_in_one_column() -> None:
    boxes = tuple(
        Box("operator", "mul" * i, "", None, None, (i - 1,) if i else (), False) for i in range(6)
    )
    middles = {round(p.x + p.w / 2) for p in lay_out(boxes).places}
    assert len(middles) == 1
