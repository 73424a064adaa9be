"""A frozen linear layer with a low-rank adapter beside it.

    y = F.linear(x, W, bias); y = y + F.linear(F.linear(dropped.float(), A), B) * scaling
    ->  y = lora_linear(x, dropped, W, bias, A, B, scaling)     the sums inside the products

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. With t = dropped A^T and
u = scaling * dy B the derivatives are

    dx = dy W        ddropped = u A        dA = u^T dropped        dB = scaling * dy^T t

Adapters are kept in float32 around a layer in bfloat16: PEFT computes theirs in float32, from a
copy of x. Here a float32 factor is split in two of x's dtype, hi + lo, which side by side are one
product for the tensor cores: t B = t_hi B_hi + t_lo B_hi + t_hi B_lo, three times the rank (less
than a tile), accumulated in float32. What is left out, t_lo B_lo, is 2^-16 of it. Beside the
layer's own products the adapter passes once over each of x, y, dy and dx; x and t are kept.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from liger_fx.kernels.launch import Launch, ceil_div, launch, power_of_two, uses_triton
from liger_fx.kernels.library import (
    Compute,
    InSteps,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.products import add_product, linear_into, wide_product

Optional = torch.Tensor | None


def lora_linear(
    x: torch.Tensor,
    dropped: Optional,
    weight: torch.Tensor,
    bias: Optional,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x W^T + bias + scaling * (dropped A^T) B^T, in x's dtype.

    x: (..., in); dropped: the same after the adapter's dropout, None for x itself; weight:
    (out, in) and bias: (out,), of x's dtype; a: (rank, in) and b: (out, rank), of any float dtype.
    Returns (..., out). Gradients for x, dropped, a and b, and second ones; the weight and the
    bias are frozen: RuntimeError where one is to be trained. ValueError for other shapes or dtypes.
    """
    rank, width = a.shape
    if weight.shape[1] != width or b.shape != (weight.shape[0], rank) or x.shape[-1] != width:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, a, b))
        raise ValueError(f"lora_linear: x, weight, a and b do not fit together: {shapes}")
    if x.dtype is not weight.dtype or (dropped is not None and dropped.dtype is not x.dtype):
        raise ValueError(f"lora_linear: x is {x.dtype}, the weight {weight.dtype}")
    y: torch.Tensor = _lora_linear(x, dropped, weight, bias, a, b, scaling)[0]
    return y


def lora_linear_reference(
    x: torch.Tensor,
    dropped: Optional,
    weight: torch.Tensor,
    bias: Optional,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator computes, in PyTorch's own operations; its second result is of no use."""
    t = F.linear((x if dropped is None else dropped).to(a.dtype), a)
    y = F.linear(x, weight, bias) + F.linear(t.to(b.dtype), b) * scaling
    return y.to(x.dtype), t


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


@triton.jit(do_not_specialize=["rows", "total"])
def _split_kernel(
    x_ptr, y_ptr, rows, total, width, x_row, y_row, y_block, factor,
    SUMMED: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < total
    row, col = place // width, place % width
    x_ptrs = x_ptr + row * x_row + col
    x = tl.load(x_ptrs, mask, other=0.0).to(tl.float32)
    if SUMMED:
        x += tl.load(x_ptrs + width, mask, other=0.0).to(tl.float32)
    x *= factor
    dtype = y_ptr.dtype.element_ty
    hi = x.to(dtype)
    lo = (x - hi.to(tl.float32)).to(dtype)
    y_ptrs = y_ptr + row * y_row + col
    tl.store(y_ptrs, hi, mask)
    tl.store(y_ptrs + y_block, lo if LEFT else hi, mask)
    tl.store(y_ptrs + 2 * y_block, hi if LEFT else lo, mask)


@lru_cache
def split_launch(total: int) -> Launch:
    """Tiles of 1024 elements: a matrix of low rank is small, and gives few programs as it is."""
    return Launch(1, min(power_of_two(total), 1024), warps=4)


def _split(
    x: torch.Tensor, dtype: torch.dtype, *, left: bool, down: bool = False,
    summed: bool = False, factor: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """factor * x as parts of `dtype`: hi, lo, hi for the left side of a product, hi, hi, lo for the
    right one; beside each other, or below each other with `down`. x: (m, n), contiguous, float32;
    with `summed` its halves, (m, 2 n), are added first.
    """
    rows, width = x.shape[0], x.shape[1] // (2 if summed else 1)
    y = x.new_empty((3 * rows, width) if down else (rows, 3 * width), dtype=dtype)
    parts = y.chunk(3, 0 if down else 1)
    if not uses_triton(x, y):
        wide = (x[:, :width] + x[:, width:] if summed else x) * factor
        hi = wide.to(dtype)
        lo = (wide - hi.to(wide.dtype)).to(dtype)
        for part, value in zip(parts, (hi, lo, hi) if left else (hi, hi, lo), strict=True):
            part.copy_(value)
        return y
    total = rows * width
    if total:
        tile = split_launch(total)
        launch(
            _split_kernel, ceil_div(total, tile.cols), x.device,
            x, y, rows, total, width, x.shape[1], y.shape[1],
            rows * width if down else width, factor,
            SUMMED=summed, LEFT=left, TILE=tile.cols, num_warps=tile.warps,
        )  # fmt: skip
    return y


def _begin(
    x: torch.Tensor,
    dropped: Optional,
    weight: torch.Tensor,
    bias: Optional,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the result, and t for the backward: as it is, or in parts."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    entering, rank = _rows(x if dropped is None else dropped), a.shape[0]
    if not _is_split(x, a):
        return y, F.linear(entering, a.to(x.dtype))
    a_parts = _split(a.contiguous(), x.dtype, left=False, down=True)
    t = wide_product(entering, a_parts[rank:].t())
    return y, _split(t, x.dtype, left=True, summed=True)


def _finish(
    results: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    dropped: Optional,
    weight: torch.Tensor,
    bias: Optional,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> None:
    """The result, of x and of t."""
    y, t = _rows(results[0]), results[1]
    linear_into(y, _rows(x), weight, bias)
    if _is_split(x, a):
        b = _split(b.contiguous(), x.dtype, left=False, factor=scaling)
    else:
        b = (b * scaling).to(x.dtype)
    add_product(y, t, b.t())


def _is_split(x: torch.Tensor, a: torch.Tensor) -> bool:
    return a.dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def _forward_fake(
    x: torch.Tensor, dropped: Optional, weight: torch.Tensor, bias: Optional, a: torch.Tensor,
    b: torch.Tensor, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rank = a.shape[0] * (3 if _is_split(x, a) else 1)
    rows = x.numel() // x.shape[-1]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((rows, rank))


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    dropped: Optional,
    t: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    x_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (empty unless `x_grad`), dropped (empty where it is x), a and b."""
    rows, entering, rank = _rows(dy), _rows(x if dropped is None else dropped), a.shape[0]
    dx = rows @ weight if x_grad else x.new_empty(0)
    if _is_split(x, a):
        b_parts = _split(b.contiguous(), x.dtype, left=False, factor=scaling)
        u = _split(wide_product(rows, b_parts[:, rank:]), x.dtype, left=True, summed=True)
        narrow_a = _split(a.contiguous(), x.dtype, left=False, down=True)
        da = wide_product(u[:, : 2 * rank].t(), entering)
        da = da[:rank] + da[rank:]
        db = wide_product(rows.t(), t[:, : 2 * rank])
        db = torch.add(db[:, :rank], db[:, rank:]).mul_(scaling).to(b.dtype)
    else:
        u, narrow_a = rows @ (b * scaling).to(x.dtype), a.to(x.dtype)
        da = (u.t() @ entering).to(a.dtype)
        db = (rows.t() @ t).mul_(scaling).to(b.dtype)
    ddropped = x.new_empty(0)
    if dropped is not None:
        ddropped = (u @ narrow_a).view(x.shape)
    elif x_grad:
        add_product(dx, u, narrow_a)
    return dx.view(x.shape) if x_grad else dx, ddropped, da, db


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, dropped: Optional, t: torch.Tensor, weight: torch.Tensor,
    a: torch.Tensor, b: torch.Tensor, scaling: float, x_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    like_x, nothing = x.new_empty(x.shape), x.new_empty(0)
    ddropped = nothing.clone() if dropped is None else like_x.clone()
    return like_x if x_grad else nothing, ddropped, a.new_empty(a.shape), b.new_empty(b.shape)


_lora_linear = define_op(
    "lora_linear(Tensor x, Tensor? dropped, Tensor weight, Tensor? bias, Tensor a, Tensor b,"
    " float scaling) -> (Tensor, Tensor)",
    InSteps(_begin, _finish),
    _forward_fake,
)
_lora_linear_backward = define_op(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor? dropped, Tensor t, Tensor weight, Tensor a,"
    " Tensor b, float scaling, bool x_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _again(ctx: Any, dy: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    x, dropped, _, weight, a, b = ctx.saved_tensors

    def plain(x: torch.Tensor, dropped: Optional, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear_reference(x, dropped, weight, None, a, b, ctx.scaling)[0]

    x_grad, dropped_grad, _, _, a_grad, b_grad, *_ = ctx.needs_input_grad
    wanted = x_grad, dropped_grad, a_grad, b_grad
    dx, ddropped, da, db = gradients_of(plain, (x, dropped, a, b), (dy,), wanted)
    return dx, ddropped, None, None, da, db, None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: Optional,
        weight: torch.Tensor,
        bias: Optional,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        compute: Compute,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            raise RuntimeError("lora_linear: the weight and the bias of the layer must be frozen")
        y, t = compute(x, dropped, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, dropped, t, weight, a, b)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        return y, t

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x_grad, dropped_grad, _, _, a_grad, b_grad, *_ = ctx.needs_input_grad
        x, dropped, t, weight, a, b = ctx.saved_tensors
        dx, ddropped, da, db = _lora_linear_backward(
            dy, x, dropped, t, weight, a, b, ctx.scaling, x_grad
        )
        return (
            dx if x_grad else None,
            ddropped if dropped_grad else None,
            None,
            None,
            da if a_grad else None,
            db if b_grad else None,
            None,
            None,
        )


differentiate(_lora_linear, _LoraLinear, lora_linear_reference)
