"""LayerNorm against the sentence that defines it, written here a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liger_fx.kernels.launch import INTERPRETED, uses_triton
from liger_fx.kernels.layer_norm import layer_norm, layer_norm_reference
from liger_fx.kernels.norm import MAX_WIDTH
from tests.kernels.accuracy import (
    DTYPES,
    assert_as_accurate,
    doubled,
    drawing,
    far_apart,
    relative_error,
    with_gradients,
)
from tests.kernels.test_rms_norm import LAYOUTS

T = torch.Tensor
EPS = 1e-5


def textbook(x: T, weight: T, bias: T, offset: float = 0.0) -> T:
    """In x's own dtype, as a formula in a paper."""
    centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centered * centered).sum(-1, keepdim=True) / x.shape[-1]
    return centered / torch.sqrt(variance + EPS) * (weight + offset) + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients(layout: str, dtype: torch.dtype, device: str) -> None:
    x = LAYOUTS[layout](drawing(dtype)) + 3  # a mean that is there to be taken away
    inputs = (x, *torch.randn(2, x.shape[-1], device=device).to(dtype))
    grad = torch.randn(x.shape, device=device).to(dtype)
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS, 0.5), inputs, grad)
    eager = with_gradients(lambda x, w, b: textbook(x, w, b, 0.5), inputs, grad)
    exact = with_gradients(lambda x, w, b: textbook(x, w, b, 0.5), doubled(inputs), grad)
    assert [t.dtype for t in ours] == [dtype] * 4
    assert_as_accurate(ours, eager, exact)


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_mean_far_from_zero_is_taken_away_before_anything_is_squared(
    mean: float, device: str
) -> None:
    """The mean of the squares less the square of the mean would be noise. The kernels take away
    what rounding leaves in the mean as well, which the formula does not."""
    x = torch.randn(40, 96, device=device) + mean
    inputs = (x, *torch.randn(2, 96, device=device))
    grad = torch.randn(x.shape, device=device)
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), inputs, grad)
    eager = with_gradients(textbook, inputs, grad)
    exact = with_gradients(textbook, doubled(inputs), grad)
    for value, plain, true in zip(ours, eager, exact, strict=True):
        limit = 1e-6 if uses_triton(x) else 2 * relative_error(plain, true)
        assert relative_error(value, true) <= limit


def test_rows_that_do_not_fill_a_tile_without_eps(device: str) -> None:
    """What lies past the last row adds nothing to the gradients, as 0 * infinity would."""
    x, weight = torch.randn(5, 8, device=device), torch.randn(8, device=device)
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, 0.0), (x, weight, weight), x.cos())
    assert all(t.isfinite().all() for t in ours)


@pytest.mark.parametrize("layout", ["transposed heads", "three strides", "expanded"])
def test_result_keeps_the_order_in_memory(layout: str) -> None:
    x = LAYOUTS[layout](drawing(torch.float32))
    assert layer_norm(x, None, None, EPS).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_factors_and_half_input(out_dtype: torch.dtype, device: str) -> None:
    x = torch.randn(6, 40, device=device, dtype=torch.bfloat16)
    inputs = (x, *torch.randn(2, 40, device=device))
    grad = torch.randn(6, 40, device=device).to(out_dtype)
    exact = with_gradients(textbook, doubled(inputs), grad)
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS, 0.0, out_dtype), inputs, grad)
    assert [t.dtype for t in ours] == [out_dtype, x.dtype, torch.float32, torch.float32]
    assert_as_accurate(ours, ours if out_dtype == torch.float32 else exact, exact)
    assert relative_error(ours[0], exact[0]) < (2e-7 if out_dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_without_weight_or_bias(has_weight: bool, has_bias: bool, device: str) -> None:
    x, grad = torch.randn(2, 6, 40, device=device)
    one, two = torch.randn(2, 40, device=device)
    weight, bias = one if has_weight else None, two if has_bias else None
    given = [t for t in (x, weight, bias) if t is not None]

    def split(factors: tuple[T, ...]) -> tuple[T | None, T | None]:
        return factors[0] if has_weight else None, factors[-1] if has_bias else None

    def formula(x: T, *factors: T) -> T:
        w, b = split(factors)
        none = x.new_zeros(40)
        return textbook(x, none + 1 if w is None else w, none if b is None else b)

    ours = with_gradients(lambda x, *factors: layer_norm(x, *split(factors), EPS), given, grad)
    exact = with_gradients(formula, doubled(given), grad)
    assert len(ours) == 2 + has_weight + has_bias
    assert_as_accurate(ours, exact, exact)


def test_of_a_single_number_nothing_is_left(device: str) -> None:
    """dx is what remains of a cancellation: it is held to the size of the terms that cancel."""
    x, grad = torch.randn(2, 300, 1, device=device)
    weight, bias = torch.randn(2, 1, device=device)
    y, dx, dw, dbias = with_gradients(
        lambda x, w, b: layer_norm(x, w, b, EPS), (x, weight, bias), grad
    )
    assert torch.equal(y, bias.expand(300, 1)) and not dw.any()
    assert relative_error(dbias, grad.double().sum(0)) < 1e-5  # 300 numbers of both signs
    terms = (grad * weight).abs() / EPS**0.5
    assert (dx.abs() <= 2e-7 * terms).all()


@pytest.mark.parametrize("width", [MAX_WIDTH, MAX_WIDTH + 1])
def test_widest_rows(width: int, device: str) -> None:
    x, grad = torch.randn(2, 2, width, device=device)
    inputs = (x, *torch.randn(2, width, device=device))
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), inputs, grad)
    exact = with_gradients(textbook, doubled(inputs), grad)
    # The interpreter has numpy add 65,536 numbers one after the other; a GPU adds them in a tree.
    limit = 1e-5 if INTERPRETED else 3e-7
    assert max(map(relative_error, ours, exact)) < limit


def test_float64_is_computed_in_float64(device: str) -> None:
    x, weight, bias = (torch.randn(4, 33, device=device, dtype=torch.float64) for _ in range(3))
    inputs = (x, weight[0], bias[0])
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, EPS, 1.0), leaves)
    for function in (layer_norm, layer_norm_reference):
        ours = with_gradients(lambda x, w, b, f=function: f(x, w, b, EPS), inputs, x.cos())
        exact = with_gradients(textbook, inputs, x.cos())
        assert max(map(relative_error, ours, exact)) < 1e-13


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    x, grad = torch.randn(2, *shape, device=device)
    factors = torch.randn(2, shape[-1], device=device)
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), (x, *factors), grad)
    assert [t.shape for t in ours] == [x.shape, x.shape, *(f.shape for f in factors)]
    assert not ours[2].any() and not ours[3].any()


def test_only_wanted_gradients(device: str) -> None:
    x, grad = torch.randn(2, 4, 8, device=device)
    inputs = (x, *torch.randn(2, 8, device=device))
    full = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), inputs, grad)[1:]
    for place in range(3):
        given = list(inputs)
        given[place] = leaf = given[place].clone().requires_grad_()
        y = layer_norm(given[0], given[1], given[2], EPS)
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], full[place])


def test_keeps_inputs_alone(device: str) -> None:
    x = torch.randn(4, 8, device=device, requires_grad=True)
    weight, bias = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    kept: list[T] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, EPS)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (x, weight, bias)]


def test_same_bits_every_time(device: str) -> None:
    x, grad = torch.randn(2, 3000, 24, device=device)
    inputs = (x, *torch.randn(2, 24, device=device))
    first, second = (
        with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), inputs, grad) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_factors_of_another_width_are_refused(role: str) -> None:
    given = {"weight": torch.randn(8), "bias": torch.randn(8)} | {role: torch.randn(7)}
    with pytest.raises(ValueError, match=rf"{role} must have shape \(8,\), not \(7,\)"):
        layer_norm(torch.randn(4, 8), given["weight"], given["bias"], EPS)


@pytest.mark.skipif(not INTERPRETED, reason="about a Triton kernel on the CPU")
def test_rows_beyond_32_bits(tmp_path: Path) -> None:
    inputs, grad = (far_apart(tmp_path, 3, 16), *torch.randn(2, 16)), torch.randn(3, 16)
    ours = with_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), inputs, grad)
    exact = with_gradients(textbook, doubled(inputs), grad)
    assert_as_accurate(ours, exact, exact)
