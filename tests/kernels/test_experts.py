"""The experts of a mixture, against their products expert by expert, in float64 and beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from liger_fx.kernels import experts as module
from liger_fx.kernels.activation import ACTIVATIONS, apply_activation
from liger_fx.kernels.expert_rows import gather_into, spread
from liger_fx.kernels.experts import experts
from liger_fx.kernels.launch import INTERPRETED
from tests.kernels.accuracy import (
    DEVICE,
    DTYPES,
    doubled,
    drawing,
    far_apart,
    relative_error,
    with_gradients,
)

Tensors = list[torch.Tensor]
# tokens, experts of each, experts, hidden, width
SHAPES = [
    (5, 2, 4, 16, 8),
    (1, 1, 3, 7, 5),
    (9, 3, 6, 33, 9),
    (4, 9, 9, 24, 130),
    (2, 2, 8, 600, 3),
]


def chosen(tokens: int, k: int, number: int) -> torch.Tensor:
    """Different experts for each token."""
    return torch.rand(tokens, number, device=DEVICE).topk(k).indices


def drawn(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False) -> Tensors:
    """x, weights, gate_up_proj and down_proj."""
    tokens, k, number, hidden, width = shape
    draw = drawing(dtype)
    into, out_of = draw(number, 2 * width, hidden), draw(number, hidden, width)
    if transposed:
        into, out_of = into.transpose(1, 2).contiguous(), out_of.transpose(1, 2).contiguous()
    return [
        draw(tokens, hidden),
        draw(tokens, k).sigmoid(),
        into / hidden**0.5,
        out_of / width**0.5,
    ]


def one_by_one(
    x: torch.Tensor,
    weights: torch.Tensor,
    into: torch.Tensor,
    out_of: torch.Tensor,
    index: torch.Tensor,
    name: str = "silu",
    transposed: bool = False,
) -> torch.Tensor:
    """As models do it, but for how the tokens are laid out."""
    rows = x.to(into.dtype).repeat_interleave(index.shape[1], 0)
    y = torch.zeros_like(rows)
    for expert in range(into.shape[0]):
        hit = (index.reshape(-1) == expert).nonzero()[:, 0]
        first, second = into[expert], out_of[expert]
        first, second = (first, second) if transposed else (first.t(), second.t())
        gate, up = (rows[hit] @ first).chunk(2, dim=-1)
        y = y.index_copy(0, hit, (apply_activation(gate, name) * up) @ second)
    return (y.view(*index.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def silu_experts(index: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda x, w, into, out_of: experts(x, index, w, into, out_of, "silu")


def compare(
    leaves: Sequence[torch.Tensor],
    index: torch.Tensor,
    name: str = "silu",
    transposed: bool = False,
    few: bool = False,
    dy: torch.Tensor | None = None,
) -> None:
    """Outputs and all gradients, for random ones of the result or for `dy`, at least as close to
    float64 as beside; of `few` elements all may have rounded by luck there."""
    if dy is None:
        dy = torch.randn(leaves[0].shape, device=DEVICE).to(leaves[0].dtype)

    def ours(x: torch.Tensor, w: torch.Tensor, into: Any, out_of: Any) -> torch.Tensor:
        return experts(x, index, w, into, out_of, name, transposed)

    def theirs(x: torch.Tensor, w: torch.Tensor, into: Any, out_of: Any) -> torch.Tensor:
        return one_by_one(x, w, into, out_of, index, name, transposed)

    found, beside = with_gradients(ours, leaves, dy), with_gradients(theirs, leaves, dy)
    exact = with_gradients(theirs, doubled(leaves), dy.double())
    dtype, units = leaves[2].dtype, float(few)
    if dtype in (torch.float32, torch.float64):
        units = 8.0  # sums in another order
    elif INTERPRETED and dtype == torch.bfloat16:
        units = 2.0  # it cuts off where PyTorch rounds
    slack = units * torch.finfo(dtype).eps
    for value, plain, true in zip(found, beside, exact, strict=True):
        assert value.dtype == plain.dtype and value.shape == plain.shape
        assert relative_error(value, true) <= 1.1 * relative_error(plain, true) + slack


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_as_expert_by_expert(
    shape: tuple[int, ...], dtype: torch.dtype, transposed: bool
) -> None:
    leaves, index = drawn(shape, dtype, transposed), chosen(*shape[:3])
    compare(leaves, index, "silu", transposed, few=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_as_accurate(dtype: torch.dtype) -> None:
    shape = 61, 4, 8, 48, 40
    compare(drawn(shape, dtype), chosen(*shape[:3]))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    compare(drawn(SHAPES[0], torch.float32), chosen(*SHAPES[0][:3]), name)


def test_long_tokens_and_routing_weights_of_short_experts() -> None:
    """As under autocast, whose products are in the dtype of the experts."""
    short, long = drawn(SHAPES[2], torch.bfloat16), drawn(SHAPES[2], torch.float32)
    compare([*long[:2], *short[2:]], chosen(*SHAPES[2][:3]), few=True)
    compare([short[0], long[1], *short[2:]], chosen(*SHAPES[2][:3]), few=True)


def test_strides() -> None:
    draw = drawing(torch.float32)
    index = chosen(6, 4, 5).t().contiguous().t()
    x, weights = draw(36, 12).t()[::2, ::2], draw(4, 6).t()
    leaves = [x, weights, draw(5, 18, 10).transpose(1, 2), draw(5, 18, 10)[..., ::2]]
    assert not any(t.is_contiguous() for t in leaves)
    compare(leaves, index)
    # The gradient of a sum is one number, expanded.
    compare(leaves, index, dy=torch.ones((), device=DEVICE).expand(x.shape))


@pytest.mark.parametrize("same", [True, False])
def test_experts_without_tokens(same: bool) -> None:
    """Their gradients are zero, and nothing of the memory that is there."""
    leaves = drawn((4, 2, 5, 16, 8), torch.float32)
    index = torch.tensor([[2, 2]] * 4 if same else [[0, 4], [4, 0], [0, 3], [3, 4]], device=DEVICE)
    compare(leaves, index)
    _, _, _, into, out_of = with_gradients(silu_experts(index), leaves, leaves[0])
    for expert in set(range(5)) - set(index.flatten().tolist()):
        assert not into[expert].any() and not out_of[expert].any()


def test_no_tokens() -> None:
    leaves, index = drawn((0, 2, 3, 8, 4), torch.float32), chosen(0, 2, 3)
    out, dx, dw, *grads = with_gradients(silu_experts(index), leaves, leaves[0])
    assert out.shape == dx.shape == (0, 8) and dw.shape == (0, 2)
    assert not any(grad.any() for grad in grads)


def test_tokens_without_experts() -> None:
    leaves, index = drawn((3, 0, 4, 8, 4), torch.float32), chosen(3, 0, 4)
    out, dx, *_ = with_gradients(silu_experts(index), leaves, leaves[0])
    assert out.shape == dx.shape == (3, 8) and not out.any() and not dx.any()


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (0, 1), (0, 3), (2, 3)], ids=str)
def test_frozen_parts(trained: tuple[int, ...]) -> None:
    leaves, index = drawn(SHAPES[0], torch.float32), chosen(*SHAPES[0][:3])
    every = with_gradients(silu_experts(index), leaves, leaves[0])
    for i in trained:
        leaves[i].requires_grad_()
    x, w, into, out_of = leaves
    found = experts(x, index, w, into, out_of, "silu")
    grads = torch.autograd.grad(found, [leaves[i] for i in trained], x.detach())
    torch.testing.assert_close(grads, tuple(every[1 + i] for i in trained))


def test_what_is_kept() -> None:
    """x and gate_up, besides what is there anyway and the order."""
    tokens, k, number, hidden, width = shape = 6, 4, 5, 16, 8
    leaves, index = [t.requires_grad_() for t in drawn(shape, torch.float32)], chosen(*shape[:3])
    kept: Tensors = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        silu_experts(index)(*leaves)
    given = {t.data_ptr() for t in leaves}
    made = [t for t in kept if t.data_ptr() not in given]
    assert sorted(tuple(t.shape) for t in made) == [(number,), (tokens, k), (tokens * k, 2 * width)]


def test_a_checkpoint_does_not_multiply_by_down_again(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, index = drawn(SHAPES[0], torch.float32), chosen(*SHAPES[0][:3])
    multiply, count = module.grouped_product, 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return multiply(*args)

    def layer(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return silu_experts(index)(x.sin(), *rest)

    expected = with_gradients(layer, leaves, leaves[0])
    monkeypatch.setattr(module, "grouped_product", counted)
    found = with_gradients(
        lambda *args: checkpoint(layer, *args, use_reentrant=False), leaves, leaves[0]
    )
    assert count == 5, "two forward, one again, two backward"
    assert all(map(torch.equal, found, expected))


def test_rows_beyond_32_bits(tmp_path: Path) -> None:
    x, place = far_apart(tmp_path, 3, 16).to(DEVICE), torch.tensor([[2], [0], [1]], device=DEVICE)
    rows = spread(x, place, torch.float32)
    assert torch.equal(rows[place[:, 0]], x)
    out = torch.empty(3, 16, device=DEVICE)
    gather_into(out, x, place, None)
    assert torch.equal(out, x[place[:, 0]])


def test_sums_are_rounded_once() -> None:
    """1 + 2^-9 + 2^-9 in bfloat16, whose last place is 2^-7 there."""
    place = torch.arange(4, device=DEVICE).view(1, 4)
    rows = torch.tensor([[1.0], [2**-9], [2**-9], [2**-8]], device=DEVICE).bfloat16()
    out = torch.empty(1, 1, device=DEVICE, dtype=torch.bfloat16)
    gather_into(out, rows, place, None)
    assert out.item() == 1 + 2**-7


def test_what_does_not_fit() -> None:
    (x, w, into, out_of), index = drawn(SHAPES[0], torch.float32), chosen(*SHAPES[0][:3])
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        experts(x, index, w, into, out_of, "tanh")
    with pytest.raises(ValueError, match="do not fit each other and 16 inputs"):
        experts(x[:, :8], index, w, into, out_of, "silu")
    with pytest.raises(ValueError, match="do not fit each other"):
        experts(x, index[:, :1], w, into, out_of, "silu")
    with pytest.raises(ValueError, match="does not fit down_proj"):
        experts(x, index, w, into, out_of[:, :, :4], "silu")
    with pytest.raises(ValueError, match=r"float32 and down_proj torch\.bfloat16"):
        experts(x, index, w, into, out_of.bfloat16(), "silu")
