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

from liger_fx.kernels import norm
from liger_fx.kernels.compile_ahead import refuse_ahead
from liger_fx.kernels.launch import compute_dtype
from liger_fx.kernels.layout import as_wide, empty_rows_like, laid_out
from liger_fx.kernels.library import (
    Compute,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.replay import Replayed


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
    if weight is not None and (weight.dim() != 1 or weight.size(0) != x.size(-1)):
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


def norm_by_pytorch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The same in fewer steps, which nothing differentiates. (Few numbers are bound by calls:
    torch.rms_norm is one, and takes longer.)"""
    dtype = compute_dtype(x, weight)
    wide = x if x.dtype is dtype else x.to(dtype)
    y = wide * _mean_square_plus(wide, _number(eps, dtype)).rsqrt_()
    if weight is not None:
        weight = weight if weight.dtype is dtype else weight.to(dtype)
        y.mul_(weight + offset if offset else weight)
    out_dtype = out_dtype or x.dtype
    return laid_out(y if out_dtype is dtype else y.to(out_dtype), x)


def _mean_square_plus(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The mean of a row's squares, plus eps. By a power of two the sum is divided exactly, so that
    it may be done while eps is added; torch.mean is two operations on a CPU, and a slow call."""
    squares, width = x * x, x.size(-1)
    if width & (width - 1) or not width or x.is_cuda:
        return torch.mean(squares, -1, True).add_(eps)
    return torch.add(eps, torch.sum(squares, -1, True), alpha=1 / width)


@lru_cache
def _number(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of no dimensions: PyTorch takes two microseconds to make one of a number."""
    refuse_ahead()
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


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


def norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if norm.fits(x, weight):
        return norm.forward(x, weight, None, eps, offset, out_dtype, centered=False)
    return norm_by_pytorch(x, weight, eps, offset, out_dtype)


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
    if norm.fits(x, dy, weight, more):
        dx, dw = norm_backward_fake(dy, x, weight, eps, offset, weight_grad)
        asked = dw if weight_grad else None
        norm.backward(dy, x, weight, eps, offset, False, dx, asked, None, more)
        return dx, dw
    plain, plain_dw = rms_norm_backward_reference(dy, x, weight, eps, offset, weight_grad, more)
    return laid_out(plain, x), x.new_empty(0) if plain_dw is None else plain_dw


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
    Replayed(norm_forward, norm_by_pytorch),
    lambda x, weight, eps, offset, out_dtype: empty_rows_like(x, out_dtype),
)
rms_norm_backward = define_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, float offset,"
    " bool weight_grad) -> (Tensor, Tensor)",
    Replayed(norm_backward),
    norm_backward_fake,
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        eps, offset = ctx.constants
        return rms_norm_reference(x, weight, eps, offset, dy.dtype)

    grads = gradients_of(plain, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:2])
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
