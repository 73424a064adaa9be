"""A sum and its RMSNorm in one operator: the same as PyTorch's sum and a norm of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from liger_fx.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.norm import MAX_WIDTH
from liger_fx.kernels.rms_norm import rms_norm
from tests.kernels.accuracy import (
    DTYPES,
    Draw,
    assert_as_accurate,
    doubled,
    drawing,
    relative_error,
    rounded,
    with_gradients,
)

T = torch.Tensor
EPS = 1e-5


def textbook(a: T, b: T, weight: T, offset: float = 0.0) -> tuple[T, T]:
    """In a's own dtype, as formulas in a paper."""
    s = a + b
    return s / torch.sqrt((s * s).sum(-1, keepdim=True) / s.shape[-1] + EPS) * (weight + offset), s


LAYOUTS: dict[str, Callable[[Draw], tuple[T, T]]] = {
    "one row": lambda draw: (draw(64), draw(64)),
    "odd width": lambda draw: (draw(3, 5, 33), draw(3, 5, 33)),
    "many short rows": lambda draw: (draw(7, 9, 11, 8), draw(7, 9, 11, 8)),
    "rows shared by programs": lambda draw: (draw(700, 33), draw(700, 33)),
    "wide": lambda draw: (draw(5, 4097), draw(5, 4097)),
    "both transposed": lambda draw: (
        draw(2, 5, 3, 16).transpose(1, 2),
        draw(2, 5, 3, 16).transpose(1, 2),
    ),
    "one transposed": lambda draw: (draw(2, 3, 5, 16), draw(2, 5, 3, 16).transpose(1, 2)),
    "part of a packed projection": lambda draw: (draw(2, 5, 9, 16)[..., 1:4, :], draw(2, 5, 3, 16)),
    "last dimension strided": lambda draw: (draw(5, 66)[:, ::2], draw(5, 33)),
    "expanded": lambda draw: (draw(1, 4, 24).expand(3, 4, 24), draw(3, 4, 24)),
}


def inputs(layout: str, dtype: torch.dtype) -> tuple[T, T, T, T, T]:
    """a, b, weight, dy and ds."""
    a, b = LAYOUTS[layout](drawing(dtype))
    draw = drawing(dtype)
    return a, b, draw(a.shape[-1]), draw(*a.shape), draw(*a.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients(layout: str, dtype: torch.dtype, device: str) -> None:
    a, b, weight, dy, ds = inputs(layout, dtype)
    y, s, da, db, dw = with_gradients(
        lambda a, b, w: add_rms_norm(a, b, w, EPS, 0.5), (a, b, weight), dy, ds
    )
    plain = a + b
    assert s.dtype == y.dtype == dtype and s.stride() == plain.stride()
    if INTERPRETED and a.is_contiguous() and b.is_contiguous():
        plain = rounded(a.double() + b.double(), dtype)
    assert torch.equal(s, plain), "the sum is that of torch.add, to the bit"
    assert torch.equal(y, rms_norm(s, weight, EPS, 0.5)), "and the norm is that of the rounded sum"
    eager = with_gradients(lambda s, w: textbook(s, 0 * s, w, 0.5), (s, weight), dy, ds)
    exact = with_gradients(lambda s, w: textbook(s, 0 * s, w, 0.5), doubled((s, weight)), dy, ds)
    assert torch.equal(da, db)
    assert_as_accurate((da, dw), eager[2:], exact[2:])


@pytest.mark.parametrize("only", ["norm", "sum"])
def test_one_result_alone(only: str, device: str) -> None:
    a, b, weight, dy, ds = inputs("odd width", torch.float32)
    x, z, w = leaves = [t.clone().requires_grad_() for t in (a, b, weight)]
    y, s = add_rms_norm(x, z, w, EPS)
    if only == "sum":
        da, db = torch.autograd.grad(s, leaves[:2], ds, retain_graph=True)
        assert torch.equal(da, ds) and torch.equal(db, ds)
        assert torch.autograd.grad(s, leaves[2], ds, allow_unused=True) == (None,)
        return
    ours = torch.autograd.grad(y, leaves, dy)
    exact = with_gradients(lambda a, b, w: textbook(a, b, w)[0], doubled((a, b, weight)), dy)
    assert max(map(relative_error, ours, exact[1:])) < 1e-6


def test_frozen_inputs_and_no_weight(device: str) -> None:
    a, b, weight, dy, ds = inputs("odd width", torch.float32)
    full = with_gradients(lambda a, b, w: add_rms_norm(a, b, w, EPS), (a, b, weight), dy, ds)[2:]
    for place in range(3):
        given = [a, b, weight]
        given[place] = leaf = given[place].clone().requires_grad_()
        x, z, w = given
        found = torch.autograd.grad(add_rms_norm(x, z, w, EPS), leaf, (dy, ds))
        assert torch.equal(found[0], full[place])
    ours = with_gradients(lambda a, b: add_rms_norm(a, b, None, EPS), (a, b), dy, ds)
    ones = torch.ones_like(weight)
    exact = with_gradients(
        lambda a, b: textbook(a, b, ones.double()), doubled((a, b)), dy.double(), ds.double()
    )
    assert max(map(relative_error, ours, exact)) < 1e-6


def test_the_gradient_that_both_share_is_never_added_to(device: str) -> None:
    """One tensor goes to a and b; each of the two has another reader, whose gradient is added."""
    a, b, weight, dy, ds = inputs("odd width", torch.float64)
    results = []
    for function in (add_rms_norm, add_rms_norm_reference):
        x, z, w = (t.clone().requires_grad_() for t in (a, b, weight))
        one, two = x * 2, z * 3
        y, s = function(one, two, w, EPS)
        loss = (y * dy).sum() + (s * ds).sum() + one.sin().sum() + two.cos().sum()
        (loss + (x * z).sum()).backward()
        x.grad.add_(1)  # type: ignore[union-attr]
        results.append((x.grad, z.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    x, z = (t.clone().requires_grad_() for t in (a, b))  # leaves themselves
    y, s = add_rms_norm(x, z, weight, EPS)
    torch.autograd.backward((y, s), (dy, ds))
    assert x.grad is not None and z.grad is not None
    before = z.grad.clone()
    x.grad.add_(1)
    assert torch.equal(z.grad, before), "no memory is shared"


def test_one_tensor_twice(device: str) -> None:
    a, _, weight, dy, ds = inputs("odd width", torch.float32)
    ours = with_gradients(lambda a, w: add_rms_norm(a, a, w, EPS), (a, weight), dy, ds)
    exact = with_gradients(lambda a, w: textbook(a, a, w), doubled((a, weight)), dy, ds)
    assert max(map(relative_error, ours, exact)) < 1e-6


def test_float64_is_computed_in_float64(device: str) -> None:
    a, b, weight = (torch.randn(4, 33, device=device, dtype=torch.float64) for _ in range(3))
    given = (a.requires_grad_(), b.requires_grad_(), weight[0].requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b, w: add_rms_norm(a, b, w, EPS, 1.0), given)
    for function in (add_rms_norm, add_rms_norm_reference):
        ours = with_gradients(lambda a, b, w, f=function: f(a, b, w, EPS), given, a.cos(), b.sin())
        exact = with_gradients(textbook, given, a.cos(), b.sin())
        assert max(map(relative_error, ours, exact)) < 1e-13


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_weight_and_half_inputs(out_dtype: torch.dtype, device: str) -> None:
    a, b, _, dy, ds = inputs("odd width", torch.bfloat16)
    weight = torch.randn(33, device=device)
    y, s, da, db, dw = with_gradients(
        lambda a, b, w: add_rms_norm(a, b, w, EPS, 0.0, out_dtype), (a, b, weight), dy, ds
    )
    assert [t.dtype for t in (y, s, da, db, dw)] == [
        out_dtype, a.dtype, a.dtype, a.dtype, weight.dtype
    ]  # fmt: skip
    exact = with_gradients(lambda s, w: textbook(s, 0 * s, w), doubled((s, weight)), dy, ds)
    assert_as_accurate((y, da, dw), (y, da, dw), (exact[0], *exact[2:]))


@pytest.mark.parametrize("width", [1, MAX_WIDTH + 1])
def test_narrowest_and_too_wide_rows(width: int, device: str) -> None:
    a, b, dy, ds = torch.randn(4, 2, width, device=device).abs() + 0.1
    weight = torch.randn(width, device=device)
    ours = with_gradients(lambda a, b, w: add_rms_norm(a, b, w, EPS), (a, b, weight), dy, ds)
    exact = with_gradients(textbook, doubled((a, b, weight)), dy, ds)
    assert max(map(relative_error, ours, exact)) < 1e-5


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    a, b, dy, ds = torch.randn(4, *shape, device=device)
    weight = torch.randn(shape[-1], device=device)
    ours = with_gradients(lambda a, b, w: add_rms_norm(a, b, w, EPS), (a, b, weight), dy, ds)
    assert [t.shape for t in ours] == [a.shape] * 4 + [weight.shape]
    assert torch.equal(ours[-1], torch.zeros_like(weight))


def test_keeps_the_sum_and_the_weight_alone(device: str) -> None:
    a, b, weight, _, _ = (x.requires_grad_() for x in inputs("odd width", torch.float32))
    kept: list[T] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, s = add_rms_norm(a, b, weight, EPS)
    assert {t.data_ptr() for t in kept} == {s.data_ptr(), weight.data_ptr()} and len(kept) == 2


def test_what_does_not_fit_is_refused() -> None:
    a = torch.randn(4, 8)
    for other, weight in ((a[0], a[0]), (a.half(), a[0]), (a, a[0, :7])):
        with pytest.raises(ValueError, match="add_rms_norm: "):
            add_rms_norm(a, other, weight, EPS)
