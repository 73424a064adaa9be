"""The pattern language: orders, brackets, casts, names, alternatives, and what a miss says."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from liger_fx.engine.match import Match, Miss
from liger_fx.engine.matcher import find
from liger_fx.engine.operators import cat, lower, mean, rsqrt, square, upper
from liger_fx.engine.pattern import Constant, Op, Pattern, Tensor, anything, choice, either
from liger_fx.engine.terms import Terms
from tests.engine.graphs import Formula, rows, trace

x, y, k = Tensor("x"), Tensor("y"), Constant("k")
norm = x * rsqrt(mean(square(x)) + k)


def first(pattern: Pattern, function: Callable[..., Any], *inputs: torch.Tensor) -> Match | Miss:
    """The first result at the node that the function returns."""
    traced = trace(Formula(function), *(inputs or (rows(),)))
    root = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    assert isinstance(root, fx.Node)
    return next(find(pattern, root, Terms(traced.root)))


def fits(pattern: Pattern, function: Callable[..., Any], *inputs: torch.Tensor) -> bool:
    return isinstance(first(pattern, function, *inputs), Match)


def test_products_and_sums_commute_and_associate() -> None:
    pattern = Tensor("x") * Op("tanh", (y,)) * Op("erf", (Tensor("z"),))
    for function in (
        lambda m, x: x * m.w.tanh() * m.b.erf(),
        lambda m, x: m.w.tanh() * (m.b.erf() * x),
        lambda m, x: (m.b.erf() * x) * m.w.tanh(),
        lambda m, x: torch.mul(m.b.erf() * m.w.tanh(), x),
    ):
        match = first(pattern, function)
        assert isinstance(match, Match)
        assert [str(match[name].node) for name in "xyz"] == ["x", "w", "b"]
        assert len(match.covered) == 4


def test_a_product_needs_every_factor_once() -> None:
    pattern = x * Op("tanh", (y,)) * Op("tanh", (Tensor("z"),))
    assert not fits(pattern, lambda m, x: x * m.w.tanh())
    assert not fits(pattern, lambda m, x: x * m.w.tanh() * m.b)
    assert fits(pattern, lambda m, x: x * m.w.tanh() * m.b.tanh())


def test_a_difference_may_be_a_sum_with_a_negative() -> None:
    for function in (
        lambda m, x: x.sin() - m.w.cos(),
        lambda m, x: x.sin() + -m.w.cos(),
        lambda m, x: torch.neg(m.w.cos()) + x.sin(),
        lambda m, x: torch.sub(x.sin(), m.w.cos()),
    ):
        match = first(x - y, function)
        assert isinstance(match, Match) and str(match["x"].node) == "sin"
    assert not fits(x - y, lambda m, x: x.sin() + m.w.cos())


def test_a_name_that_stands_twice_is_one_value() -> None:
    assert fits(norm, lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1))
    miss = first(norm, lambda m, x: m.w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1))
    assert str(miss) == "wanted x (x) again, found w"


def test_the_same_part_taken_twice_is_one_value() -> None:
    pattern = lower(x) * y + lower(x) * Tensor("z")
    assert fits(pattern, lambda m, x: x[..., :4] * m.w[:4] + x.chunk(2, -1)[0] * m.b[4:])
    assert not fits(pattern, lambda m, x: x[..., :4] * m.w[:4] + x.chunk(2, -1)[1] * m.b[4:])


def test_constants_are_captured_and_must_agree() -> None:
    match = first(norm, lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.125))
    assert isinstance(match, Match) and match["k"] == 0.125
    twice = x * k + y * k
    assert fits(twice, lambda m, x: x * 3 + m.w * 3)
    assert not fits(twice, lambda m, x: x * 3 + m.w * 4)
    assert not fits(x * k, lambda m, x: x * m.w)
    assert fits(x * 0.7978845608, lambda m, x: x * 0.7978845608028654)
    assert not fits(x * 0.79, lambda m, x: x * 0.7978845608028654)


def test_attributes_are_captured_and_must_agree() -> None:
    pattern = Op("unsqueeze", (x,), {"dim": Constant("dim")}) * Op("unsqueeze", (y,), {"dim": -2})
    match = first(pattern, lambda m, x: x.unsqueeze(1) * m.w.unsqueeze(0))
    assert isinstance(match, Match) and match["dim"] == -3
    both = Op("unsqueeze", (x,), {"dim": k}) * Op("unsqueeze", (y,), {"dim": k})
    assert fits(both, lambda m, x: x.unsqueeze(-2) * m.w.unsqueeze(-2))
    assert not fits(both, lambda m, x: x.unsqueeze(1) * m.w.unsqueeze(0))


def test_the_first_alternative_that_fits_wins_and_a_choice_remembers_it() -> None:
    pattern = choice("kind", {"sine": Op("tanh", (x,)), "other": Op("relu", (x,))}) * y
    for function, label in (
        (lambda m, x: x.tanh() * m.w, "sine"),
        (lambda m, x: m.w * torch.relu(x), "other"),
    ):
        match = first(pattern, function)
        assert isinstance(match, Match) and match["kind"] == label
    assert fits(either(Op("erf", (x,)), Op("relu", (x,))), lambda m, x: torch.relu(x))
    both = choice("kind", {1: Op("tanh", (x,)), 2: Op("relu", (x,))})
    assert not fits(cat(both, both), lambda m, x: torch.cat([x.tanh(), x.relu()], -1))
    assert fits(cat(both, both), lambda m, x: torch.cat([x.relu(), x.relu()], -1))


def test_every_way_to_fit_is_given() -> None:
    traced = trace(Formula(lambda m, x: x.sin() * m.w.cos()), rows())
    root = next(node for node in traced.graph.nodes if node.target == "mul")
    ways = list(find(x * y, root, Terms(traced.root)))
    assert [str(way["x"].node) for way in ways] == ["sin", "cos"]  # type: ignore[index]


def test_casts_below_the_root_are_looked_through() -> None:
    def function(m: Formula, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1)
        return (wide * root.to(torch.float64)).to(x.dtype)

    match = first(norm, function, rows(dtype=torch.bfloat16))
    assert isinstance(match, Match)
    assert str(match["x"].node) == "x" and match.spec("x").dtype is torch.bfloat16
    assert {"to", "to_1", "float_1"} <= {node.name for node in match.covered}


def test_a_cast_that_loses_digits_belongs_to_the_captured_value() -> None:
    def function(m: Formula, x: torch.Tensor) -> torch.Tensor:
        short = x.to(torch.bfloat16)
        return short * torch.rsqrt(short.pow(2).mean(-1, keepdim=True) + 1)

    match = first(norm, function)
    assert isinstance(match, Match) and match.spec("x").dtype is torch.bfloat16


def test_a_cast_between_two_uses_of_a_name_may_lose_nothing() -> None:
    def function(m: Formula, x: torch.Tensor) -> torch.Tensor:
        short = x.to(torch.bfloat16).float()
        return x * torch.rsqrt(short.pow(2).mean(-1, keepdim=True) + 1)

    assert not fits(norm, function)


def test_a_conversion_to_integers_is_not_looked_through() -> None:
    assert fits(square(x) * y, lambda m, x: x.pow(2).double() * m.w)
    assert not fits(square(x) * y, lambda m, x: x.pow(2).int() * m.w)


def test_a_miss_names_what_was_wanted_what_stood_there_and_why() -> None:
    miss = first(norm, lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1))
    assert isinstance(miss, Miss)
    assert str(miss) == "wanted mean(square(x)), found sum(pow_1, -1, True)"
    assert miss.node is not None and miss.node.name == "sum_1"
    miss = first(norm, lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1))
    assert str(miss) == "dims is (-2,), not (-1,), in mean(pow_1, 1, True)"
    miss = first(norm, lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.w))
    assert str(miss) == "wanted the number k, found w"


def test_the_furthest_miss_is_kept() -> None:
    pattern = either(x * y + Op("tanh", (x,)), x * rsqrt(mean(square(x))))
    miss = first(pattern, lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True)))
    assert str(miss) == "wanted square(x), found pow(x, 3)"


def test_halves_are_told_apart() -> None:
    turned = cat(-upper(x), lower(x))
    assert fits(turned, lambda m, x: torch.cat([-x[..., 4:], x[..., :4]], -1))
    for wrong in (
        lambda m, x: torch.cat([x[..., :4], -x[..., 4:]], -1),
        lambda m, x: torch.cat([-x[..., :4], x[..., 4:]], -1),
        lambda m, x: torch.cat([-x[..., 1::2], x[..., ::2]], -1),
        lambda m, x: torch.cat([-x[..., 4:], x.sin()[..., :4]], -1),
        lambda m, x: torch.cat([x[..., 4:], x[..., :4]], -1),
    ):
        assert not fits(turned, wrong)


FACTORS = {
    "x": lambda m, x, root: x,
    "w": lambda m, x, root: m.w,
    "root": lambda m, x, root: root,
}


def random_product(names: list[str], choose: random.Random) -> Callable[..., Any]:
    """The product of three factors, in a random order, with random brackets and spellings."""
    names = choose.sample(names, len(names))
    spell = [choose.choice((torch.mul, lambda a, b: a * b, lambda a, b: b.mul(a))) for _ in "12"]
    left = choose.random() < 0.5
    eps_first, power = choose.random() < 0.5, choose.randrange(4)

    def function(m: Formula, x: torch.Tensor) -> torch.Tensor:
        squared = (x * x, x.pow(2), x**2, torch.square(x))[power].mean(-1, keepdim=True)
        root = ((1e-3 + squared) if eps_first else squared.add(1e-3)).rsqrt()
        a, b, c = (FACTORS[name](m, x, root) for name in names)
        return spell[0](spell[1](a, b), c) if left else spell[0](a, spell[1](b, c))

    return function


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_respelling_of_a_product_fits(choose: random.Random) -> None:
    match = first(norm * y, random_product(["x", "w", "root"], choose))
    assert isinstance(match, Match)
    assert (str(match["x"].node), str(match["y"].node), match["k"]) == ("x", "w", 1e-3)


@settings(max_examples=15, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from([["x", "x", "w"], ["w", "w", "x"], ["w", "w", "root"], ["root", "root", "w"]]),
)
def test_a_product_without_one_of_the_factors_does_not(
    choose: random.Random, names: list[str]
) -> None:
    assert not fits(norm * y, random_product(names, choose))


@pytest.mark.parametrize("pattern", [anything, x])
def test_anything_fits_any_tensor(pattern: Pattern) -> None:
    assert fits(pattern, lambda m, x: x.sin())
