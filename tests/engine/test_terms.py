"""Operators by what they compute: every spelling of one thing is one term."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.engine.term import describe
from liger_fx.engine.terms import Terms
from tests.engine.graphs import Formula, rows, spell, term_of, trace

SAME = {
    "square(x)": [
        lambda m, x: x.pow(2),
        lambda m, x: torch.pow(x, 2.0),
        lambda m, x: x * x,
        lambda m, x: x**2,
        lambda m, x: torch.square(x),
        lambda m, x: x.square(),
        lambda m, x: operator.mul(x, x),
    ],
    "rsqrt(x)": [
        lambda m, x: x.rsqrt(),
        lambda m, x: torch.rsqrt(x),
        lambda m, x: 1 / torch.sqrt(x),
        lambda m, x: 1.0 / x.sqrt().float(),
        lambda m, x: x.sqrt().reciprocal(),
        lambda m, x: torch.reciprocal(x**0.5),
        lambda m, x: x.pow(-0.5),
        lambda m, x: torch.pow(x, -0.5),
    ],
    "mul(w, rsqrt(x))": [
        lambda m, x: m.w / torch.sqrt(x),
        lambda m, x: torch.div(m.w, x.sqrt()),
        lambda m, x: m.w * x.rsqrt(),
        lambda m, x: torch.multiply(m.w, torch.rsqrt(x)),
        lambda m, x: m.w / x**0.5,
    ],
    "mean(x, dims=(-1,), keepdim=True)": [
        lambda m, x: x.mean(-1, keepdim=True),
        lambda m, x: torch.mean(x, 2, True),
        lambda m, x: x.mean(dim=(-1,), keepdim=True),
        lambda m, x: x.mean(axis=-1, keepdim=True),
        lambda m, x: x.mean(-1, keepdims=True),
        lambda m, x: torch.mean(x, axis=(-1,), keepdims=True),  # type: ignore[call-overload]
        lambda m, x: torch.sum(a=x, axis=-1, keepdims=True) / 8,  # type: ignore[call-overload]
        lambda m, x: x.sum(-1, keepdim=True) / 8,
        lambda m, x: x.mean(-1).unsqueeze(-1),
        lambda m, x: x.mean(-1)[..., None],
    ],
    "neg(x)": [lambda m, x: -x, lambda m, x: torch.neg(x), lambda m, x: x * -1],
    "silu(x)": [lambda m, x: F.silu(x), lambda m, x: nn.SiLU()(x)],
    "gelu_tanh(x)": [lambda m, x: F.gelu(x, approximate="tanh")],
    "gelu(x)": [lambda m, x: F.gelu(x)],
    "relu(x)": [
        lambda m, x: F.relu(x),
        lambda m, x: torch.relu(x),
        lambda m, x: x.relu(),
        lambda m, x: x.relu_(),
        lambda m, x: F.relu(x, inplace=True),
    ],
    "alias(x)": [
        lambda m, x: x.contiguous(),
        lambda m, x: x.clone(),
        lambda m, x: F.dropout(x, 0.0, True),
        lambda m, x: x.view(x.shape),
        lambda m, x: x[:, :, 0:8],
    ],
    "rms_norm(x, w, eps=0.001, module=None)": [lambda m, x: F.rms_norm(x, (8,), m.w, 1e-3)],
}


@pytest.mark.parametrize(
    ("expected", "function"), [(text, f) for text, fs in SAME.items() for f in fs]
)
def test_spellings_of_one_operator(expected: str, function: object) -> None:
    assert spell(term_of(function)) == expected  # type: ignore[arg-type]


DIFFERENT = [
    lambda m, x: x.pow(2.5),
    lambda m, x: x.add(m.w, alpha=2),
    lambda m, x: torch.div(x, m.w, rounding_mode="floor"),
    lambda m, x: x.mean(),
    lambda m, x: x.mean(1, keepdim=True),
    lambda m, x: x.sum(-1, keepdim=True) / 7,
    lambda m, x: x.sum(1, keepdim=True) / 8,
    lambda m, x: x.mean(-1, dtype=torch.float64),
    lambda m, x: F.dropout(x, 0.1, False),
    lambda m, x: F.gelu(x).sqrt(),
    lambda m, x: F.rms_norm(x, (5, 8)),
    lambda m, x: x.view(torch.int32),
    lambda m, x: F.silu(x.clone(), inplace=True),
]


@pytest.mark.parametrize("function", DIFFERENT)
def test_what_computes_something_else_has_another_name(function: object) -> None:
    assert spell(term_of(function)) not in SAME  # type: ignore[arg-type]


def test_casts_between_floating_types_are_casts_others_are_not() -> None:
    assert term_of(lambda m, x: x.to(torch.bfloat16)).op == "cast"
    assert term_of(lambda m, x: x.double()).op == "cast"
    assert term_of(lambda m, x: x.type_as(m.w.half())).op == "cast"
    assert term_of(lambda m, x: x.to(torch.int32)).op == "opaque"
    assert term_of(lambda m, x: x.to(torch.int32).float()).op == "convert"
    assert term_of(lambda m, x: x, rows()).op == "opaque"


def test_leaf_modules_are_the_operators_they_compute() -> None:
    modules = {
        nn.Linear(8, 4): "linear(x, module=0)",
        nn.Identity(): "alias(x)",
        nn.Dropout(0.0): "alias(x)",
        nn.Dropout(0.1): "dropout(x)",
        nn.GELU("tanh"): "gelu_tanh(x)",
        nn.ReLU(): "relu(x)",
        nn.ReLU(inplace=True): "relu(x)",
        nn.RMSNorm(8, eps=0.5): "rms_norm(x, eps=0.5, module=0)",
    }
    for module, expected in modules.items():
        traced = trace(nn.Sequential(module), rows())
        output = next(node for node in traced.graph.nodes if node.op == "output")
        text = spell(Terms(traced.root)(output.args[0])).replace("input_1", "x")
        assert text == expected


def test_reading_changes_nothing_and_reads_only_what_is_asked_for() -> None:
    module = Formula(lambda m, x: (x.pow(2).mean(-1, keepdim=True) + 1) * x.sin())
    traced = trace(module, rows())
    before = str(traced.graph)
    view = Terms(traced.root)
    last = [node for node in traced.graph.nodes if node.target == "mul"][-1]
    assert view(last).op == "mul" and list(view._terms) == [last]
    assert str(traced.graph) == before


def test_a_chain_of_any_length_can_be_compared() -> None:
    def long(m: Formula, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3000):
            x = x + 1
        return x

    traced = trace(Formula(long), rows())
    view, nodes = Terms(traced.root), list(traced.graph.nodes)
    assert not view.same(view(nodes[-2]), view(nodes[-3]))


def test_equal_operators_on_equal_values_are_the_same() -> None:
    module = Formula(
        lambda m, x: torch.stack([x[..., :4].sin(), x[..., :4], x[..., 4:], x[..., :4]])
    )
    traced = trace(module, rows())
    view = Terms(traced.root)
    _, a, b, c = view(next(n for n in traced.graph.nodes if n.target is torch.stack)).operands
    assert view.same(a, c) and a.node is not c.node
    assert not view.same(a, b)
    sin = next(n for n in traced.graph.nodes if n.target == "sin")
    assert not view.same(view(sin), a)


def test_a_node_as_text() -> None:
    def function(m: Formula, x: torch.Tensor) -> torch.Tensor:
        return (torch.cat([x[..., 4:], x[..., ::2]], -1) * m.w).to(torch.float16)

    traced = trace(Formula(function), rows())
    texts = [describe(n) for n in traced.graph.nodes if n.op in ("call_function", "call_method")]
    assert texts == [
        "x[..., 4:]",
        "x[..., ::2]",
        "cat([getitem, getitem_1], -1)",
        "mul(cat, w)",
        "to(mul, float16)",
    ]
