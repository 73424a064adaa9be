"""The gated product and the layer after it, against the two one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from liger_fx.kernels import gated_linear as module
from liger_fx.kernels.activation import ACTIVATIONS
from liger_fx.kernels.gated_activation import gated_activation, packed_gated_activation
from liger_fx.kernels.gated_linear import gated_linear
from liger_fx.kernels.launch import INTERPRETED
from tests.kernels.accuracy import DTYPES, doubled, drawing, relative_error, with_gradients

SHAPES = [(2, 5, 24), (33, 16), (1, 2050), (3, 1, 2, 6)]


def one_after_the_other(
    gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.linear(gated_activation(gate, up, "silu"), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_as_one_after_the_other(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = drawing(dtype)
    leaves = [draw(*shape), draw(*shape), draw(7, shape[-1]) / shape[-1] ** 0.5, draw(7)]
    dy = draw(*shape[:-1], 7)
    ours = with_gradients(lambda g, u, w, b: gated_linear(g, u, w, b, "silu"), leaves, dy)
    apart = with_gradients(one_after_the_other, leaves, dy)
    exact = with_gradients(one_after_the_other, doubled(leaves), dy.double())
    for value, beside, true in zip(ours, apart, exact, strict=True):
        assert value.dtype == dtype
        # The interpreter cuts bfloat16 off where PyTorch rounds it.
        slack = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 1e-6
        assert relative_error(value, true) <= 1.05 * relative_error(beside, true) + slack


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_halves_of_one_tensor(name: str, gate_first: bool) -> None:
    draw = drawing(torch.float32)
    leaves = [draw(3, 5, 34), draw(8, 17)]
    dy = draw(3, 5, 8)
    ours = with_gradients(lambda g, w: gated_linear(g, None, w, None, name, gate_first), leaves, dy)
    apart = with_gradients(
        lambda g, w: F.linear(packed_gated_activation(g, name, gate_first), w), leaves, dy
    )
    torch.testing.assert_close(ours, apart)


def test_strides_frozen_weights_and_no_rows() -> None:
    draw = drawing(torch.float32)
    gate, up, weight = draw(4, 6, 16).transpose(0, 1), draw(6, 4, 32)[..., ::2], draw(8, 16)
    expected = with_gradients(
        lambda g, u: F.linear(gated_activation(g, u, "silu"), weight), (gate, up), draw(6, 4, 8)
    )
    grad = torch.ones_like(expected[0])
    ours = with_gradients(lambda g, u: gated_linear(g, u, weight, None, "silu"), (gate, up), grad)
    plain = with_gradients(
        lambda g, u: F.linear(gated_activation(g, u, "silu"), weight), (gate, up), grad
    )
    torch.testing.assert_close(ours, plain)
    leaves = [draw(0, 16), draw(0, 16), weight]
    _, _, _, dw = with_gradients(
        lambda g, u, w: gated_linear(g, u, w, None, "silu"), leaves, draw(0, 8)
    )
    assert not dw.any()


def test_what_does_not_fit() -> None:
    draw = drawing(torch.float32)
    with pytest.raises(ValueError, match="does not fit a weight"):
        gated_linear(draw(3, 16), draw(3, 16), draw(8, 15), None, "silu")
    with pytest.raises(ValueError, match="does not fit a weight"):
        gated_linear(draw(3, 16).double(), None, draw(8, 8), None, "silu")


def test_the_product_is_not_kept() -> None:
    draw = drawing(torch.float32)
    gate, up, weight = (t.requires_grad_() for t in (draw(9, 64), draw(9, 64), draw(8, 64)))
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_linear(gate, up, weight, None, "silu")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (gate, up, weight)}


def test_a_checkpoint_does_not_multiply_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = drawing(torch.float32)
    leaves = [draw(9, 64), draw(9, 64), draw(8, 64)]
    dy = draw(9, 8)
    multiply, count = module.linear_into, 0

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1
        multiply(*args)

    def layer(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gated_linear(gate.sin(), up.sin(), weight, None, "silu")

    expected = with_gradients(layer, leaves, dy)
    monkeypatch.setattr(module, "linear_into", counted)
    found = with_gradients(lambda *args: checkpoint(layer, *args, use_reentrant=False), leaves, dy)
    assert count == 1
    assert all(map(torch.equal, found, expected))
