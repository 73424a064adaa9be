"""A sum and its LayerNorm in one operator: the same as PyTorch's sum and a norm of it."""

from __future__ import annotations

import pytest
import torch

from liger_fx.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.layer_norm import layer_norm
from liger_fx.kernels.norm import MAX_WIDTH
from tests.kernels.accuracy import (
    DTYPES,
    assert_as_accurate,
    doubled,
    drawing,
    relative_error,
    rounded,
    with_gradients,
)
from tests.kernels.test_add_rms_norm import LAYOUTS
from tests.kernels.test_layer_norm import EPS, textbook

T = torch.Tensor


def both(a: T, b: T, weight: T, bias: T) -> tuple[T, T]:
    """In a's own dtype, one after the other."""
    return textbook(a + b, weight, bias), a + b


def inputs(layout: str, dtype: torch.dtype) -> tuple[T, T, T, T, T, T]:
    """a, b, weight, bias, dy and ds."""
    draw = drawing(dtype)
    a, b = LAYOUTS[layout](draw)
    return a, b, draw(a.shape[-1]), draw(a.shape[-1]), draw(*a.shape), draw(*a.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients(layout: str, dtype: torch.dtype, device: str) -> None:
    a, b, weight, bias, dy, ds = inputs(layout, dtype)
    y, s, da, db, dw, dbias = with_gradients(
        lambda a, b, w, c: add_layer_norm(a, b, w, c, EPS, 0.5), (a, b, weight, bias), dy, ds
    )
    plain = a + b
    assert s.dtype == y.dtype == dtype and s.stride() == plain.stride()
    if INTERPRETED and a.is_contiguous() and b.is_contiguous():
        plain = rounded(a.double() + b.double(), dtype)
    assert torch.equal(s, plain), "the sum is that of torch.add, to the bit"
    assert torch.equal(y, layer_norm(s, weight, bias, EPS, 0.5)), "of the rounded sum"

    def formula(s: T, weight: T, bias: T) -> tuple[T, T]:
        return textbook(s, weight, bias, 0.5), s * 1

    eager = with_gradients(formula, (s, weight, bias), dy, ds)
    exact = with_gradients(formula, doubled((s, weight, bias)), dy, ds)
    assert torch.equal(da, db)
    assert_as_accurate((da, dw, dbias), eager[2:], exact[2:])


@pytest.mark.parametrize("only", ["norm", "sum"])
def test_one_result_alone(only: str, device: str) -> None:
    *given, dy, ds = inputs("odd width", torch.float32)
    leaves = a, b, weight, bias = [x.requires_grad_() for x in given]
    y, s = add_layer_norm(a, b, weight, bias, EPS)
    if only == "sum":
        found = torch.autograd.grad(s, leaves, ds, allow_unused=True)
        assert torch.equal(found[0], ds) and torch.equal(found[1], ds)
        assert found[2:] == (None, None)
        return
    ours = torch.autograd.grad(y, leaves, dy)
    exact = with_gradients(lambda a, b, w, c: both(a, b, w, c)[0], doubled(given), dy)
    assert max(map(relative_error, ours, exact[1:])) < 1e-6


def test_only_wanted_gradients_and_no_factors(device: str) -> None:
    *given, dy, ds = inputs("odd width", torch.float32)
    full = with_gradients(lambda a, b, w, c: add_layer_norm(a, b, w, c, EPS), given, dy, ds)[2:]
    for place in range(4):
        some = list(given)
        some[place] = leaf = some[place].clone().requires_grad_()
        a, b, weight, bias = some
        found = torch.autograd.grad(add_layer_norm(a, b, weight, bias, EPS), leaf, (dy, ds))
        assert torch.equal(found[0], full[place])
    a, b, weight, _ = given
    ones, zeros = torch.ones_like(weight).double(), torch.zeros_like(weight).double()
    ours = with_gradients(lambda a, b: add_layer_norm(a, b, None, None, EPS), (a, b), dy, ds)
    exact = with_gradients(lambda a, b: both(a, b, ones, zeros), doubled((a, b)), dy, ds)
    assert max(map(relative_error, ours, exact)) < 1e-6


def test_one_tensor_twice(device: str) -> None:
    a, _, weight, bias, dy, ds = inputs("odd width", torch.float32)
    given = (a, weight, bias)
    ours = with_gradients(lambda a, w, b: add_layer_norm(a, a, w, b, EPS), given, dy, ds)
    exact = with_gradients(lambda a, w, b: both(a, a, w, b), doubled(given), dy, ds)
    assert max(map(relative_error, ours, exact)) < 1e-6


def test_float64_is_computed_in_float64(device: str) -> None:
    given = [torch.randn(4, 33, device=device, dtype=torch.float64) for _ in range(4)]
    given = [*given[:2], given[2][0], given[3][0]]
    leaves = [t.clone().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda a, b, w, c: add_layer_norm(a, b, w, c, EPS, 1.0), leaves)
    grads = given[0].cos(), given[1].sin()
    for function in (add_layer_norm, add_layer_norm_reference):
        ours = with_gradients(lambda a, b, w, c, f=function: f(a, b, w, c, EPS), given, *grads)
        assert max(map(relative_error, ours, with_gradients(both, given, *grads))) < 1e-13


def test_too_wide_rows(device: str) -> None:
    a, b, dy, ds = torch.randn(4, 2, MAX_WIDTH + 1, device=device)
    given = (a, b, *torch.randn(2, MAX_WIDTH + 1, device=device))
    ours = with_gradients(lambda a, b, w, c: add_layer_norm(a, b, w, c, EPS), given, dy, ds)
    exact = with_gradients(both, doubled(given), dy, ds)
    assert max(map(relative_error, ours, exact)) < 1e-5


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    a, b, dy, ds = torch.randn(4, *shape, device=device)
    factors = torch.randn(2, shape[-1], device=device)
    ours = with_gradients(
        lambda a, b, w, c: add_layer_norm(a, b, w, c, EPS), (a, b, *factors), dy, ds
    )
    assert [t.shape for t in ours] == [a.shape] * 4 + [factors[0].shape] * 2
    assert not ours[-1].any() and not ours[-2].any()


def test_keeps_the_sum_and_the_factors_alone(device: str) -> None:
    a, b, weight, bias, _, _ = (x.requires_grad_() for x in inputs("odd width", torch.float32))
    kept: list[T] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, s = add_layer_norm(a, b, weight, bias, EPS)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (s, weight, bias)]


def test_what_does_not_fit_is_refused() -> None:
    a = torch.randn(4, 8)
    short = a[0, :7]
    others: list[tuple[T, T | None, T | None]] = [
        (a[0], a[0], a[0]), (a.half(), a[0], a[0]), (a, short, None), (a, None, short)
    ]  # fmt: skip
    for b, weight, bias in others:
        with pytest.raises(ValueError, match="add_layer_norm: "):
            add_layer_norm(a, b, weight, bias, EPS)
