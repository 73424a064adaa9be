"""RMSNorm: each row divided by its root mean square, then scaled.

    x32 = x.float(); y = (x32 * rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)) * (offset + weight)
    ->  y = rms_norm(x, weight, eps, offset)          one read of x, one write of y

Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019. With r = rsqrt(mean(x^2) + eps),
g = dy * (offset + weight) and n the row's width, the derivatives are

    dx = r * (g - x * r^2 * sum(g * x) / n)          dweight = sum over rows of dy * x * r

Both sums of a row are taken in the same pass, so the backward needs x and the weight, nothing else.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from liger_fx.kernels.launch import (
    Launch,
    ceil_div,
    compute_dtype,
    launch,
    multiprocessors,
    power_of_two,
    uses_triton,
)
from liger_fx.kernels.layout import as_rows, as_wide, empty_rows_like, laid_out
from liger_fx.kernels.library import (
    Compute,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.replay import Replayed

FEW_STEPS = 4
FEW_NUMBERS = 1 << 15
MAX_WIDTH = 65_536  # a row is held in the registers of one program; wider ones use PyTorch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = x * rsqrt(mean(x^2, -1) + eps) * (offset + weight), in float32, rounded once.

    x: (..., width), any strides; weight: (width,), or None for no multiplication (and no offset).
    Returns (..., width) in `out_dtype` (x's by default), in x's order of dimensions in memory.
    Float64 is computed in float64. ValueError if weight's shape is not (width,).
    Gradients: x's in x's dtype; weight's in weight's, summed over the rows in float32, in an order
    that does not change from run to run. Second derivatives go through
    `rms_norm_reference`.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must have shape ({x.shape[-1]},), not {tuple(weight.shape)}"
        )
    return _rms_norm(x, weight, eps, offset, out_dtype)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What `rms_norm` computes, in PyTorch's own operations."""
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(dtype) + offset)
    return y.to(out_dtype or x.dtype)


def _by_pytorch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The same in fewer steps, which nothing differentiates. Few numbers are bound by calls, which
    torch.rms_norm does in one; many by memory, of which it takes more."""
    is_few, out_dtype = x.numel() <= FEW_NUMBERS, out_dtype or x.dtype
    if is_few and not offset and out_dtype is x.dtype is (x if weight is None else weight).dtype:
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    dtype = compute_dtype(x, weight)
    wide = as_wide(x, dtype)
    if weight is not None:
        weight = as_wide(weight, dtype)
        weight = weight + offset if offset else weight
    if is_few:
        return as_wide(torch.rms_norm(wide, wide.shape[-1:], weight, eps), out_dtype)
    y = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return as_wide(y if weight is None else y.mul_(weight), out_dtype)


def rms_norm_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_grad: bool,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and, if wanted, weight by the formulas above, in PyTorch's own operations.

    more: a gradient that x has from elsewhere, to which this one is added.
    """
    dtype = compute_dtype(x, weight)
    wide, grad = as_wide(x, dtype), as_wide(dy, dtype)
    r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed, dw = wide * r, None
    if weight is None:
        g = grad.clone()
    else:
        scale = as_wide(weight, dtype)
        g = grad * (scale + offset if offset else scale)
    dx = g.addcmul_(normed, (g * normed).mean(-1, keepdim=True), value=-1).mul_(r)
    dx = dx if more is None else dx.add_(more)
    if weight is not None and weight_grad:
        dw = as_wide(normed.mul_(grad).sum_to_size(weight.shape), weight.dtype)
    return as_wide(dx, x.dtype), dw


@triton.jit
def _row_offset(row, inner, outer_stride, inner_stride, ONE_STRIDE: tl.constexpr):
    if ONE_STRIDE:
        return row * inner_stride
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit(do_not_specialize=["rows", "inner"])
def _forward_kernel(
    x_ptr, w_ptr, y_ptr, rows, inner, width, x_outer, x_inner, eps, offset,
    ONE_STRIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    x_row = _row_offset(row, inner, x_outer, x_inner, ONE_STRIDE)
    x = tl.load(x_ptr + x_row[:, None] + col[None, :], mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, col < width, other=0.0).to(tl.float32) + offset
    r = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * r[:, None]
    if HAS_WEIGHT:
        y = y * w[None, :]
    y_ptrs = y_ptr + row[:, None] * width + col[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["steps", "rows", "inner"])
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, more_ptr, dx_ptr, partial_ptr, steps, rows, inner, width,
    dy_outer, dy_inner, x_outer, x_inner, more_outer, more_inner, eps, offset,
    ONE_STRIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    HAS_MORE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, COLS)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, col < width, other=0.0).to(tl.float32) + offset
    if WEIGHT_GRAD:
        dw = tl.zeros((ROWS, COLS), tl.float32)
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
        squares, products = tl.split(tl.sum(tl.join(x * x, g * x), axis=1))  # one reduction
        # Rows past the last are zeros, whose root is infinite without eps: they shall add nothing.
        r = tl.where(row < rows, tl.rsqrt(squares / width + eps), 0.0)
        slope = r * r * (products / width)
        dx = r[:, None] * (g - x * slope[:, None])
        if HAS_MORE:
            more_row = _row_offset(row, inner, more_outer, more_inner, ONE_STRIDE)
            more = tl.load(more_ptr + more_row[:, None] + col[None, :], mask, other=0.0)
            dx += more.to(tl.float32)
        dx_ptrs = dx_ptr + row[:, None] * width + col[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask)
        if WEIGHT_GRAD:
            dw += dy * (x * r[:, None])
    if WEIGHT_GRAD:
        partial_ptr += tl.program_id(0).to(tl.int64) * width
        total = tl.sum(dw, axis=0).to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + col, total, col < width)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(x_ptr, y_ptr, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        total += tl.load(x_ptr + row[:, None] * width + col[None, :], mask, other=0.0)
    tl.store(y_ptr + col, tl.sum(total, axis=0).to(y_ptr.dtype.element_ty), col < width)


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


def norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if not uses_triton(x, weight) or x.shape[-1] > MAX_WIDTH:
        return laid_out(_by_pytorch(x, weight, eps, offset, out_dtype), x)
    y = empty_rows_like(x, out_dtype)
    if not y.numel():
        return y
    width = x.shape[-1]
    count, inner, (x,), strides, outer = as_rows((x,), (y,), levels=2)
    tile = forward_launch(width)
    launch(
        _forward_kernel, ceil_div(count, tile.rows), x.device,
        x, None if weight is None else weight.contiguous(), y,
        count, inner, width, outer[0], strides[0], eps, offset,
        ONE_STRIDE=inner == count, HAS_WEIGHT=weight is not None,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    return y


def norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_grad: bool,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and dweight: of no elements unless `weight_grad`. more: as the reference has it."""
    if not uses_triton(dy, x, weight, more) or x.shape[-1] > MAX_WIDTH:
        plain, plain_dw = rms_norm_backward_reference(dy, x, weight, eps, offset, weight_grad, more)
        return laid_out(plain, x), x.new_empty(0) if plain_dw is None else plain_dw
    dx, dw = norm_backward_fake(dy, x, weight, eps, offset, weight_grad)
    if not dx.numel():
        return dx, dw.zero_()
    width = x.shape[-1]
    given: tuple[torch.Tensor, ...] = (dy, x) if more is None else (dy, x, more)
    count, inner, given, strides, outer = as_rows(given, (dx,), levels=2)
    dy, x, more = given[0], given[1], None if more is None else given[2]
    tile = backward_launch(width, sum(t.element_size() for t in given))
    steps = ceil_div(count, tile.rows)
    programs = backward_programs(steps, tile, x.device)
    partial = partial_sums(dw, programs) if weight_grad else None
    launch(
        _backward_kernel, programs, x.device,
        dy, x, None if weight is None else weight.contiguous(), more, dx, partial,
        steps, count, inner, width, outer[0], strides[0], outer[1], strides[1],
        outer[2], strides[2], eps, offset,  # those of dx where there is no more
        ONE_STRIDE=inner == count, HAS_WEIGHT=weight is not None, WEIGHT_GRAD=weight_grad,
        HAS_MORE=more is not None,
        ROWS=tile.rows, COLS=tile.cols, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if partial is not None and partial is not dw:
        sum_of_rows(partial, dw)
    return dx, dw


def backward_programs(steps: int, tile: Launch, device: torch.device) -> int:
    """How many programs share the steps: one takes a few in less time than the launch that would
    add up what several leave of a weight's gradient."""
    return 1 if steps <= FEW_STEPS else min(steps, tile.per_sm * multiprocessors(device))


def partial_sums(dw: torch.Tensor, programs: int) -> torch.Tensor:
    """Where each program leaves its sum, a row for each; of one program that is `dw` itself."""
    return dw if programs == 1 else dw.new_empty((programs, dw.numel()), dtype=torch.float32)


def sum_of_rows(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of the rows of a float32 matrix into a vector, in an order that is always the
    same; both are contiguous."""
    rows, width = partial.shape
    tile = sum_launch(rows)
    launch(
        _sum_kernel, ceil_div(width, tile.cols), out.device, partial, out, rows, width,
        ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip


def norm_backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_grad: bool,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dw = weight.new_empty(weight.shape) if weight is not None and weight_grad else x.new_empty(0)
    return empty_rows_like(x), dw


_rms_norm = define_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, ScalarType? out_dtype) -> Tensor",
    Replayed(norm_forward),
    lambda x, weight, eps, offset, out_dtype: empty_rows_like(x, out_dtype),
)
rms_norm_backward = define_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, float offset,"
    " bool weight_grad) -> (Tensor, Tensor)",
    Replayed(norm_backward),
    norm_backward_fake,
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        eps, offset = ctx.constants
        return rms_norm_reference(x, weight, eps, offset, dy.dtype)

    grads = gradients_of(norm, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:2])
    return *grads, *(None,) * 4


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype | None,
        compute: Compute,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.constants = eps, offset
        return compute(x, weight, eps, offset, out_dtype)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight_grad = ctx.needs_input_grad[1]
        dx, dw = rms_norm_backward(dy, *ctx.saved_tensors, *ctx.constants, weight_grad)
        return dx, dw if weight_grad else None, *(None,) * 4


differentiate(_rms_norm, _RMSNorm, rms_norm_reference)
