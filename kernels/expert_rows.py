"""Tokens, and the rows that they are where each row goes to one expert.

    rows[place[t, j]] = x[t]                                        spread
    out[t] = sum over j of weights[t, j] * rows[place[t, j]]        gathered
    the gradients of the gated activation between the two           gated_gradients

`place` says where the j-th row of a token lies: a permutation of tokens * k numbers, (tokens, k),
int64. One program serves a token and its k rows, so that what is summed over them is
summed in one go: no atomics, in float32, rounded once.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from liger_fx.kernels.activation import activate_and_slope
from liger_fx.kernels.gated_activation import (
    gated_activation_backward_reference,
    gated_activation_reference,
    halves,
)
from liger_fx.kernels.launch import Launch, compute_dtype, launch, power_of_two, uses_triton
from liger_fx.kernels.layout import with_unit_stride


def spread(x: torch.Tensor, place: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each token as often as it has experts, in `dtype`.

    x: (tokens, width), any strides. Returns (tokens * k, width), contiguous.
    """
    tokens, k = place.shape
    rows = x.new_empty((tokens * k, x.shape[1]), dtype=dtype)
    if not uses_triton(x, rows):
        rows[place.reshape(-1)] = x.to(dtype).repeat_interleave(k, 0)
        return rows
    x = with_unit_stride(x)
    _launch(_spread_kernel, place, rows, x, rows, x.stride(0))
    return rows


def gather_into(
    out: torch.Tensor, rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor | None
) -> None:
    """Fill `out` with the sum of each token's rows, each times its weight if there are any.

    out: (tokens, width), contiguous; rows: (tokens * k, width); weights: (tokens, k).
    """
    if not place.numel() or not uses_triton(out, rows, weights):
        dtype = compute_dtype(out, rows, weights)
        wide = rows[place].to(dtype)
        if weights is not None:
            wide = wide * weights.to(dtype).unsqueeze(-1)
        out.copy_(wide.sum(1))
        return
    rows, given = with_unit_stride(rows), rows if weights is None else weights.contiguous()
    is_weighted = weights is not None
    _launch(_gather_kernel, place, out, rows, given, out, rows.stride(0), WEIGHTED=is_weighted)


def gated_gradients(
    dproduct: torch.Tensor,
    gate_up: torch.Tensor,
    place: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate_up and of the weights, where product = activation(gate) * up is
    weighted: `dproduct`, the gradient of weights * product, is overwritten by that product.

    dproduct: (tokens * k, width), contiguous; gate_up: (tokens * k, 2 * width), contiguous, gate
    first. Returns tensors like gate_up and weights.
    """
    dgate_up, dweights = gate_up.new_empty(gate_up.shape), weights.new_empty(weights.shape)
    if uses_triton(dproduct, gate_up, weights):
        _launch(
            _gated_kernel, place, dproduct, dproduct, gate_up, weights.contiguous(), dgate_up,
            dweights, NAME=activation,
        )  # fmt: skip
        return dgate_up, dweights
    gate, up = halves(gate_up, True)
    dtype = compute_dtype(gate_up, weights)
    wide, weight_of = dproduct.to(dtype), weights.new_empty((len(gate_up), 1), dtype=dtype)
    weight_of[place.reshape(-1)] = weights.to(dtype).reshape(-1, 1)
    product = gated_activation_reference(gate.to(dtype), up.to(dtype), activation)
    dweights.copy_((wide * product).sum(-1)[place])
    grads = gated_activation_backward_reference(
        wide * weight_of, gate.to(dtype), up.to(dtype), activation
    )
    dgate_up.copy_(torch.cat(grads, -1))
    dproduct.copy_(product * weight_of)
    return dgate_up, dweights


@triton.jit
def _rows_of(place_ptr, k, K: tl.constexpr):
    """The token of this program, where its rows lie (64-bit), and which of them exist."""
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K)
    return token, tl.load(place_ptr + token * k + j, j < k, other=0)[:, None], j < k


@triton.jit
def _spread_kernel(
    place_ptr, x_ptr, rows_ptr, x_stride, k, cols, K: tl.constexpr, COLS: tl.constexpr
):
    token, row, there = _rows_of(place_ptr, k, K)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        x = tl.load(x_ptr + token * x_stride + col, col < cols, other=0.0)
        tile = tl.broadcast_to(x.to(rows_ptr.dtype.element_ty)[None, :], (K, COLS))
        mask = there[:, None] & (col < cols)[None, :]
        tl.store(rows_ptr + row * cols + col[None, :], tile, mask)


@triton.jit
def _gather_kernel(
    place_ptr, rows_ptr, weights_ptr, out_ptr, rows_stride, k, cols,
    WEIGHTED: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token, row, there = _rows_of(place_ptr, k, K)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        mask = there[:, None] & (col < cols)[None, :]
        tile = tl.load(rows_ptr + row * rows_stride + col[None, :], mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            j = tl.arange(0, K)
            weight = tl.load(weights_ptr + token * k + j, there, other=0.0).to(tl.float32)
            tile = tile * weight[:, None]
        out = tl.sum(tile, 0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * cols + col, out, col < cols)


@triton.jit
def _gated_kernel(
    place_ptr, dproduct_ptr, gate_up_ptr, weights_ptr, dgate_up_ptr, dweights_ptr, k, cols,
    NAME: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token, row, there = _rows_of(place_ptr, k, K)
    j = tl.arange(0, K)
    weight = tl.load(weights_ptr + token * k + j, there, other=0.0).to(tl.float32)
    dots = tl.zeros((K,), tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)[None, :]
        mask = there[:, None] & (col < cols)
        at, packed = row * cols + col, row * (2 * cols) + col
        grad = tl.load(dproduct_ptr + at, mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_ptr + packed, mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + packed + cols, mask, other=0.0).to(tl.float32)
        y, slope = activate_and_slope(gate, NAME)
        dots += tl.sum(grad * y * up, 1)
        grad = grad * weight[:, None]
        dgate, dup = grad * up * slope, grad * y
        tl.store(dgate_up_ptr + packed, dgate.to(dgate_up_ptr.dtype.element_ty), mask)
        tl.store(dgate_up_ptr + packed + cols, dup.to(dgate_up_ptr.dtype.element_ty), mask)
        product = y * up * weight[:, None]
        tl.store(dproduct_ptr + at, product.to(dproduct_ptr.dtype.element_ty), mask)
    tl.store(dweights_ptr + token * k + j, dots.to(dweights_ptr.dtype.element_ty), there)


@lru_cache
def rows_launch(k: int, cols: int) -> Launch:
    """Tiles of 2048 elements, all rows of a token in each."""
    rows = power_of_two(k)
    return Launch(rows, min(power_of_two(cols), max(2048 // rows, 16)), warps=4)


def _launch(
    kernel: Any, place: torch.Tensor, like: torch.Tensor, *args: Any, **constants: Any
) -> None:
    """Run `kernel` for each token, over the columns of `like`."""
    (tokens, k), cols = place.shape, like.shape[1]
    if not tokens * k * cols:
        return
    tile = rows_launch(k, cols)
    launch(
        kernel, tokens, like.device, place.contiguous(), *args, k, cols,
        K=tile.rows, COLS=tile.cols, num_warps=tile.warps, **constants,
    )  # fmt: skip
