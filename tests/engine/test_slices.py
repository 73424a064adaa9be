"""Parts of a tensor: every spelling of one part is one slice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_fx.engine.slices import take, whole
from liger_fx.engine.terms import Terms
from tests.engine.graphs import BATCH, TOKENS, Formula, rows, spell, term_of, trace

LOWER, UPPER = "slice(x, start=0, stop=4, step=1)", "slice(x, start=4, stop=8, step=1)"
EVEN, ODD = "slice(x, start=0, stop=7, step=2)", "slice(x, start=1, stop=8, step=2)"

SAME = {
    LOWER: [
        lambda m, x: x[..., :4],
        lambda m, x: x[:, :, 0:4],
        lambda m, x: x[..., :-4],
        lambda m, x: x.chunk(2, -1)[0],
        lambda m, x: torch.chunk(x, 2, dim=2)[0],
        lambda m, x: x.split(4, dim=-1)[0],
        lambda m, x: torch.split(x, [4, 4], -1)[0],
        lambda m, x: x.narrow(-1, 0, 4),
        lambda m, x: x.view(BATCH, TOKENS, 2, 4)[..., 0, :],
        lambda m, x: x.unflatten(-1, (2, 4)).unbind(-2)[0],
        lambda m, x: x[..., :6][..., :4],
    ],
    UPPER: [
        lambda m, x: x[..., 4:],
        lambda m, x: x[..., -4:],
        lambda m, x: x.chunk(2, -1)[1],
        lambda m, x: x.split([2, 2, 4], -1)[2],
        lambda m, x: x[..., 2:][..., 2:],
        lambda m, x: x.view(BATCH, TOKENS, 2, 4).unbind(2)[1],
    ],
    EVEN: [
        lambda m, x: x[..., ::2],
        lambda m, x: x[..., 0::2],
        lambda m, x: x[:, :, ::2],
        lambda m, x: x.reshape(BATCH, TOKENS, 4, 2)[..., 0],
        lambda m, x: x.view(BATCH, TOKENS, -1, 2).unbind(-1)[0],
        lambda m, x: x[..., :7:2],
    ],
    ODD: [
        lambda m, x: x[..., 1::2],
        lambda m, x: x[..., 1:][..., ::2],
        lambda m, x: x.view(BATCH, TOKENS, 4, 2)[..., 1],
    ],
    "interleave(w, b)": [
        lambda m, x: torch.stack((m.w, m.b), -1).flatten(-2),
        lambda m, x: torch.stack([m.w, m.b], dim=1).view(16),
        lambda m, x: torch.stack([m.w, m.b], dim=-1).reshape(16),
    ],
    "cat(w, b, dim=-1)": [
        lambda m, x: torch.cat((m.w, m.b)),
        lambda m, x: torch.cat([m.w, m.b], dim=0),
        lambda m, x: torch.stack([m.w, m.b]).flatten(),
    ],
    "deinterleave(x)": [
        lambda m, x: x.view(BATCH, TOKENS, 4, 2).transpose(-1, -2).reshape(BATCH, TOKENS, 8),
        lambda m, x: x.unflatten(-1, (4, 2)).transpose(3, 2).flatten(2),
    ],
    "unsqueeze(x, dim=-3)": [
        lambda m, x: x.unsqueeze(1),
        lambda m, x: torch.unsqueeze(x, -3),
        lambda m, x: x[:, None],
        lambda m, x: x[:, None, :, :],
    ],
    "unsqueeze(slice(x, start=0, stop=4, step=1), dim=-3)": [
        lambda m, x: x.unsqueeze(1)[..., :4],
        lambda m, x: x[..., :4].unsqueeze(1),
    ],
    "unsqueeze(repeat_interleave(x, repeats=2), dim=-3)": [
        lambda m, x: x.unsqueeze(1).repeat_interleave(2, dim=-1),
        lambda m, x: torch.repeat_interleave(x[:, None], 2, 3),
        lambda m, x: x.repeat_interleave(2, -1).unsqueeze(1),
    ],
}


@pytest.mark.parametrize(
    ("expected", "function"), [(text, f) for text, fs in SAME.items() for f in fs]
)
def test_spellings_of_one_part(expected: str, function: object) -> None:
    assert spell(term_of(function)) == expected  # type: ignore[arg-type]


DIFFERENT = [
    lambda m, x: x[..., 1:5],
    lambda m, x: x[:, :4],
    lambda m, x: x[..., 1],
    lambda m, x: x[:, 1:, :4],
    lambda m, x: x.view(BATCH, TOKENS, 2, 4)[..., 0],
    lambda m, x: x.view(BATCH, TOKENS, 2, 4).transpose(-1, -2).reshape(BATCH, TOKENS, 8),
    lambda m, x: torch.stack((m.w, m.b), 0).flatten(-2)[..., None],
    lambda m, x: x.view(TOKENS, BATCH, 8),
    lambda m, x: x.repeat_interleave(2, dim=1),
    lambda m, x: torch.cat((x, x), 1),
]


@pytest.mark.parametrize("function", DIFFERENT)
def test_other_parts_have_other_names(function: object) -> None:
    assert spell(term_of(function)) not in SAME  # type: ignore[arg-type]


extents = st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(extents, extents)
def test_a_slice_of_a_slice_is_what_torch_takes(first: tuple, second: tuple) -> None:
    x = torch.arange(16).expand(1, 16)
    traced = trace(Formula(lambda m, x: x.sin()), rows(16))
    view = Terms(traced.root)
    base = view(next(iter(traced.graph.nodes)))
    inner = take(view, base, slice(*first))
    expected = x[..., slice(*first)] if inner is not None else x[..., :0]
    outer = take(view, inner, slice(*second)) if inner is not None else None
    if outer is None:  # nothing is left
        assert expected[..., slice(*second)].numel() == 0 or inner is None
        return
    if outer is base:
        assert expected[..., slice(*second)].tolist() == x.tolist()
        return
    assert outer.operands[0] is base
    places = slice(*(outer.attributes[key] for key in ("start", "stop", "step")))
    assert x[..., places].tolist() == expected[..., slice(*second)].tolist()
    assert outer.width == x[..., places].shape[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["halves", "places"])
)
def test_a_tensor_is_found_from_either_of_its_halves(
    start: int, half: int, step: int, kind: str
) -> None:
    traced = trace(Formula(lambda m, x: x.sin()), rows(32))
    view = Terms(traced.root)
    base = view(next(iter(traced.graph.nodes)))
    tensor = take(view, base, slice(start, start + 2 * half * step, step))
    if tensor is None or tensor.width != 2 * half:
        return
    if kind == "halves":
        parts = {"lower": slice(0, half), "upper": slice(half, None)}
    else:
        parts = {"even": slice(0, None, 2), "odd": slice(1, None, 2)}
    for which, places in parts.items():
        part = take(view, tensor, places)
        assert part is not None
        found = whole(view, part, which)
        assert found is not None and spell(found) == spell(tensor)


def test_the_tensor_of_a_half_is_the_node_that_the_model_made() -> None:
    def function(m: Formula, x: torch.Tensor) -> torch.Tensor:
        head = x[..., 2:6]
        return head[..., :2] * 2 + head.sum(-1, keepdim=True)

    traced = trace(Formula(function), rows())
    view = Terms(traced.root)
    head, lower = (n for n in traced.graph.nodes if n.op == "call_function" and "getitem" in n.name)
    found = whole(view, view(lower), "lower")
    assert found is not None and found.node is head


def test_no_tensor_has_a_half_that_is_none() -> None:
    traced = trace(Formula(lambda m, x: x[..., 2:8]), rows())
    view = Terms(traced.root)
    part = view(next(n for n in traced.graph.nodes if n.name == "getitem"))
    assert whole(view, part, "upper") is None  # would begin at -4
    assert whole(view, part, "lower") is None  # would end at 14
    assert whole(view, part, "even") is None  # is not every other place
