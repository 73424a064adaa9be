"""The Triton kernels of both norms of a row, and of the norm of a sum: what rms_norm.py,
layer_norm.py and the operators that add first have in common.

    y = x * r * (offset + weight) + bias     r = 1 / sqrt(mean(x^2) + eps)

where x is the row, of a LayerNorm without its mean. With g = dy * (offset + weight), of a LayerNorm
without its mean, and n the row's width, the derivatives are

    dx = r * (g - x * r^2 * sum(g * x) / n)
    dweight = sum over rows of dy * x * r    dbias = sum over rows of dy

Everything that a row needs is summed from x and dy where they are: the backward needs x and the
weight, nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from liger_fx.kernels.launch import (
    Launch,
    ceil_div,
    launch,
    multiprocessors,
    power_of_two,
    uses_triton,
)
from liger_fx.kernels.layout import as_rows, empty_rows_like

MAX_WIDTH = 65_536  # a row is held in the registers of one program; wider ones use PyTorch
FEW_STEPS = 4


@triton.jit
def _row_offset(row, inner, outer_stride, inner_stride, ONE_STRIDE: tl.constexpr):
    if ONE_STRIDE:
        return row * inner_stride
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _without_mean(x, mask, width):
    """Each row less its mean, but for what rounding leaves of it: the mean of the result, which is
    for the caller to take away as well. (Of numbers far from zero it is large.)"""
    return tl.where(mask, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)


@triton.jit(do_not_specialize=["rows", "inner"])
def _forward_kernel(
    x_ptr, b_ptr, w_ptr, bias_ptr, y_ptr, s_ptr, rows, inner, width, x_outer, x_inner, eps, offset,
    ONE_STRIDE: tl.constexpr, ADDS: tl.constexpr, CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    place = row[:, None] * width + col[None, :]
    x_row = _row_offset(row, inner, x_outer, x_inner, ONE_STRIDE)
    x = tl.load(x_ptr + x_row[:, None] + col[None, :], mask, other=0.0).to(tl.float32)
    if ADDS:  # b lies as y does
        x += tl.load(b_ptr + place, mask, other=0.0).to(tl.float32)
        s = x.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + place, s, mask)
        x = s.to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, col < width, other=0.0).to(tl.float32) + offset
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, col < width, other=0.0).to(tl.float32)
    if CENTERED:
        x = _without_mean(x, mask, width)
        squares, left = tl.split(tl.sum(tl.join(x * x, x), axis=1))  # one reduction
        left /= width
        x -= left[:, None]
        r = tl.rsqrt(squares / width - left * left + eps)
    else:
        r = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * r[:, None]
    if HAS_WEIGHT:
        y = y * w[None, :]
    if HAS_BIAS:
        y = y + bias[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["steps", "rows", "inner"])
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, more_ptr, dx_ptr, dw_ptr, dbias_ptr, steps, rows, inner, width,
    dy_outer, dy_inner, x_outer, x_inner, more_outer, more_inner, eps, offset,
    ONE_STRIDE: tl.constexpr, CENTERED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, HAS_MORE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, COLS)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, col < width, other=0.0).to(tl.float32) + offset
    if WEIGHT_GRAD:
        dw = tl.zeros((ROWS, COLS), tl.float32)
    if BIAS_GRAD:
        dbias = tl.zeros((ROWS, COLS), tl.float32)
    for step in tl.range(tl.program_id(0), steps, tl.num_programs(0), num_stages=STAGES):
        row = tl.full((ROWS,), step, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x_row = _row_offset(row, inner, x_outer, x_inner, ONE_STRIDE)
        dy_row = _row_offset(row, inner, dy_outer, dy_inner, ONE_STRIDE)
        x = tl.load(x_ptr + x_row[:, None] + col[None, :], mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_row[:, None] + col[None, :], mask, other=0.0).to(tl.float32)
        g = dy
        if HAS_WEIGHT:
            g = dy * w[None, :]
        if CENTERED:
            x = _without_mean(x, mask, width)
            sums = tl.sum(tl.join(tl.join(x * x, g * x), tl.join(x, g)), axis=1)  # one reduction
            of_products, of_factors = tl.split(sums)
            squares, products = tl.split(of_products)
            left, mean_g = tl.split(of_factors)
            left, mean_g = left / width, mean_g / width
            x -= left[:, None]
            variance = squares / width - left * left
            product = products / width - left * mean_g
            g -= mean_g[:, None]
        else:
            squares, products = tl.split(tl.sum(tl.join(x * x, g * x), axis=1))
            variance, product = squares / width, products / width
        # Rows past the last are zeros, whose root is infinite without eps: they shall add nothing.
        r = tl.where(row < rows, tl.rsqrt(variance + eps), 0.0)
        dx = r[:, None] * (g - x * (r * r * product)[:, None])
        if HAS_MORE:
            more_row = _row_offset(row, inner, more_outer, more_inner, ONE_STRIDE)
            more = tl.load(more_ptr + more_row[:, None] + col[None, :], mask, other=0.0)
            dx += more.to(tl.float32)
        dx_ptrs = dx_ptr + row[:, None] * width + col[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask)
        if WEIGHT_GRAD:
            dw += dy * (x * r[:, None])
        if BIAS_GRAD:
            dbias += dy
    start = tl.program_id(0).to(tl.int64) * width
    if WEIGHT_GRAD:
        total = tl.sum(dw, axis=0).to(dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + start + col, total, col < width)
    if BIAS_GRAD:
        total = tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + start + col, total, col < width)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    x_ptr, y_ptr, z_ptr, rows, width, TWO: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(width, COLS)
    matrix = tl.program_id(0) // blocks
    x_ptr += matrix.to(tl.int64) * rows * width
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        total += tl.load(x_ptr + row[:, None] * width + col[None, :], mask, other=0.0)
    sums = tl.sum(total, axis=0)
    if matrix == 0:
        tl.store(y_ptr + col, sums.to(y_ptr.dtype.element_ty), col < width)
    elif TWO:
        tl.store(z_ptr + col, sums.to(z_ptr.dtype.element_ty), col < width)


@lru_cache
def forward_launch(width: int) -> Launch:
    """Tiles of at least 4096 elements, 16 to a thread."""
    cols = power_of_two(width)
    rows = max(1, 4096 // cols)
    return Launch(rows, cols, warps=min(rows * cols // 512, 32))


@lru_cache
def backward_launch(width: int, column_bytes: int) -> Launch:
    """The same tiles, one program a multiprocessor that loops over its share of them. Loads run
    ahead by as many tiles as fit in 96 KiB of shared memory, at most three: on an H100 that
    beats more programs with fewer loads ahead by 4 to 7% up to a width of 4096.
    column_bytes: what an element of each tensor that is loaded takes, together.
    """
    rows, cols, warps, _, _ = forward_launch(width)
    ahead = min(98304 // (rows * cols * column_bytes), 3)
    return Launch(rows, cols, warps, stages=1 + ahead)


@lru_cache
def sum_launch(rows: int) -> Launch:
    """Columns in groups of 32 (128 bytes), up to 256 rows at once."""
    return Launch(min(power_of_two(rows), 256), 32, warps=8)


def fits(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernels serve these tensors."""
    return uses_triton(x, *others) and x.shape[-1] <= MAX_WIDTH


def fits_sum(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernel that adds a and b first serves these tensors."""
    fit = fits(a, b, *others) and a.numel() > 0
    return fit and a.is_contiguous() and b.is_contiguous()


def fake_of_sum(a: torch.Tensor, b: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of a + b, whose dtype is the last that is given, and the sum, both empty."""
    s = torch.add(a, b)
    return empty_rows_like(s, given[-1]), s


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
    centered: bool,
) -> torch.Tensor:
    """The norm of x, of tensors that fit."""
    y = empty_rows_like(x, out_dtype)
    if y.numel():
        _forward(x, None, weight, bias, y, None, eps, offset, centered)
    return y


def forward_of_sum(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of a + b, and that sum, of contiguous tensors that fit and are not empty."""
    y = torch.empty(a.shape, dtype=out_dtype or a.dtype, device=a.device)
    s = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    _forward(a, b, weight, bias, y, s, eps, offset, centered)
    return y, s


def _forward(
    x: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    s: torch.Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
) -> None:
    width = x.shape[-1]
    count, inner, (x,), strides, outer = as_rows((x,), (y,), levels=2)
    tile = forward_launch(width)
    launch(
        _forward_kernel, ceil_div(count, tile.rows), x.device,
        x, b, _dense(weight), _dense(bias), y, s,
        count, inner, width, outer[0], strides[0], eps, offset,
        ONE_STRIDE=inner == count, ADDS=b is not None, CENTERED=centered,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    dx: torch.Tensor,
    dw: torch.Tensor | None,
    dbias: torch.Tensor | None,
    more: torch.Tensor | None = None,
) -> None:
    """Write the gradients that are wanted, of tensors that fit. dx: as `empty_rows_like(x)`.
    more: a gradient that x has from elsewhere, to which this one is added."""
    wanted = [grad for grad in (dw, dbias) if grad is not None]
    if not dx.numel():
        for grad in wanted:
            grad.zero_()
        return
    width = x.shape[-1]
    given: tuple[torch.Tensor, ...] = (dy, x) if more is None else (dy, x, more)
    count, inner, given, strides, outer = as_rows(given, (dx,), levels=2)
    dy, x, more = given[0], given[1], None if more is None else given[2]
    tile = backward_launch(width, sum(t.element_size() for t in given))
    steps = ceil_div(count, tile.rows)
    programs = backward_programs(steps, tile, x.device)
    sums = dw, dbias
    if wanted and programs > 1:
        partial = x.new_empty((len(wanted), programs, width), dtype=torch.float32)
        sums = None if dw is None else partial[0], None if dbias is None else partial[-1]
    launch(
        _backward_kernel, programs, x.device,
        dy, x, _dense(weight), more, dx,
        *sums, steps, count, inner, width, outer[0], strides[0], outer[1], strides[1],
        outer[2], strides[2], eps, offset,  # those of dx where there is no more
        ONE_STRIDE=inner == count, CENTERED=centered, HAS_WEIGHT=weight is not None,
        WEIGHT_GRAD=dw is not None, BIAS_GRAD=dbias is not None, HAS_MORE=more is not None,
        ROWS=tile.rows, COLS=tile.cols, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if wanted and programs > 1:
        sum_of_rows(partial, *wanted)


def backward_programs(steps: int, tile: Launch, device: torch.device) -> int:
    """How many programs share the steps: one takes a few in less time than the launch that would
    add up what several leave of the gradients of weight and bias."""
    return 1 if steps <= FEW_STEPS else min(steps, tile.per_sm * multiprocessors(device))


def partial_sums(dw: torch.Tensor, programs: int) -> torch.Tensor:
    """Where each program leaves its sum, a row for each; of one program that is `dw` itself."""
    return dw if programs == 1 else dw.new_empty((programs, dw.numel()), dtype=torch.float32)


def sum_of_rows(
    partial: torch.Tensor, out: torch.Tensor, second: torch.Tensor | None = None
) -> None:
    """Write the sum of the rows of a float32 matrix into a vector, or of each of two that follow
    each other into one of two, in an order that is always the same; all are contiguous."""
    rows, width = partial.shape[-2:]
    tile = sum_launch(rows)
    blocks = ceil_div(width, tile.cols)
    launch(
        _sum_kernel, blocks if second is None else 2 * blocks, out.device,
        partial, out, second, rows, width, TWO=second is not None,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip


def _dense(factor: torch.Tensor | None) -> torch.Tensor | None:
    return None if factor is None else factor.contiguous()
