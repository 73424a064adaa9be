"""The adapted linear layer against PEFT's way to compute it, in float64 and side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from liger_fx.kernels import lora_linear as module
from liger_fx.kernels.lora_linear import lora_linear
from tests.kernels.accuracy import DEVICE, DTYPES, doubled, drawing, relative_error, with_gradients

Tensors = list[torch.Tensor]
SCALING = 1.7


def by_peft(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """With dropped, weight, bias, a and b, as PEFT's layer spells it."""
    dropped, weight, bias, a, b = rest
    y = F.linear(x, weight, bias)
    return (y + F.linear(F.linear(dropped.to(a.dtype), a), b) * SCALING).to(y.dtype)


def drawn(dtype: torch.dtype, shape: tuple[int, ...], rank: int, out: int) -> Tensors:
    """x, dropped, weight, bias, a and b: the adapter's own in float32."""
    draw, wide = drawing(dtype), drawing(torch.float32)
    width = shape[-1]
    x, dropped, weight = draw(*shape), draw(*shape), draw(out, width) / width**0.5
    return [x, dropped, weight, draw(out), wide(rank, width) / width**0.5, wide(out, rank) * 0.3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["x itself", "dropped"])
@pytest.mark.parametrize(
    ("shape", "rank", "out"),
    [((2, 5, 24), 4, 40), ((33, 16), 1, 7), ((3, 1, 2, 48), 13, 16), ((1, 64), 96, 512)],
)
def test_as_accurate_as_peft(
    dtype: torch.dtype, apart: bool, shape: tuple[int, ...], rank: int, out: int
) -> None:
    x, dropped, weight, bias, a, b = drawn(dtype, shape, rank, out)
    dy = drawing(dtype)(*shape[:-1], out)

    def ours(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *d: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, d[0] if d else None, weight, bias, a, b, SCALING)

    def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *d: torch.Tensor) -> torch.Tensor:
        return by_peft(x, d[0] if d else x, weight.to(x.dtype), bias.to(x.dtype), a, b)

    leaves = [x, a, b, dropped] if apart else [x, a, b]
    exact = with_gradients(plain, doubled(leaves), dy.double())
    eager = with_gradients(plain, leaves, dy)
    for value, beside, true in zip(with_gradients(ours, leaves, dy), eager, exact, strict=True):
        assert value.dtype == beside.dtype
        # PEFT's gradients of an adapter are float32 sums of products of the same rounded numbers.
        floor = 1e-6 if dtype == torch.float32 else 3e-5 if value.dtype == torch.float32 else 0
        limit = 1.1 * relative_error(beside, true) + floor
        assert relative_error(value, true) <= limit


def test_views_and_frozen_inputs() -> None:
    x, _, weight, _, a, b = drawn(torch.float32, (6, 4, 24), 4, 8)
    view = x.transpose(0, 1)
    expected = by_peft(view, view, weight, torch.zeros(8, device=DEVICE), a, b)
    torch.testing.assert_close(lora_linear(view, None, weight, None, a, b, SCALING), expected)
    y = lora_linear(view, None, weight, None, a.requires_grad_(), b, SCALING)
    (da,) = torch.autograd.grad(y.square().sum(), (a,))
    again = by_peft(view, view, weight, torch.zeros(8, device=DEVICE), a, b)
    torch.testing.assert_close(da, torch.autograd.grad(again.square().sum(), (a,))[0])


def test_no_rows() -> None:
    x, _, weight, bias, a, b = drawn(torch.bfloat16, (0, 24), 4, 8)
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    y = lora_linear(x, None, weight, bias, a, b, SCALING)
    assert y.shape == (0, 8)
    _, da, db = torch.autograd.grad(y.sum(), leaves)
    assert not da.any() and not db.any()


def test_a_layer_that_is_trained_is_refused() -> None:
    x, _, weight, bias, a, b = drawn(torch.float32, (5, 24), 4, 8)
    for trained in (weight, bias):
        trained.requires_grad_()
        with pytest.raises(RuntimeError, match="must be frozen"):
            lora_linear(x, None, weight, bias, a, b, SCALING)
        trained.requires_grad_(False)
    with pytest.raises(ValueError, match="do not fit together"):
        lora_linear(x, None, weight, bias, a, b.t(), SCALING)
    with pytest.raises(ValueError, match="the weight"):
        lora_linear(x.double(), None, weight, bias, a, b, SCALING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_does_not_multiply_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backward keeps is saved before the layer's own product, as F.linear saves it."""
    x, _, weight, bias, a, b = drawn(dtype, (6, 24), 4, 8)
    dy = drawing(dtype)(6, 8)
    multiply, count = module.linear_into, 0

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1
        multiply(*args)

    def layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x.sin(), None, weight, bias, a, b, SCALING)

    expected = with_gradients(layer, [x, a, b], dy)
    monkeypatch.setattr(module, "linear_into", counted)
    found = with_gradients(
        lambda *args: checkpoint(layer, *args, use_reentrant=False), [x, a, b], dy
    )
    assert count == 1
    assert all(map(torch.equal, found, expected))


def test_nothing_that_is_kept_is_written_into() -> None:
    """The result is computed after its node is made, which may be used again."""
    x, _, weight, bias, a, b = drawn(torch.float32, (6, 24), 4, 8)
    a.requires_grad_()
    y = lora_linear(x, None, weight, bias, a, b, SCALING)
    grads = [torch.autograd.grad(y.square().sum(), a, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    y.mul_(2)  # as any result may be
    (da,) = torch.autograd.grad(y.square().sum(), a)
    torch.testing.assert_close(da, 4 * grads[0])
