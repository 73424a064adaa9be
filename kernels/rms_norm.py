"""RMSNorm: each row divided by its root mean square, then scaled.

    x32 = x.float(); y = (x32 * rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)) * (offset + weight)
    ->  y = rms_norm(x, weight, eps, offset)          one read of x, one write of y

Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019. With r = rsqrt(mean(x^2) + eps),
g = dy * (offset + weight) and n the row's width, the derivatives are

    dx = r * (g - x * r^2 * sum(g * x) / n)          dweight = sum over rows of dy * x * r

Both sums of a row are taken in the same pass, so the backward needs x and the weight, nothing else.
"""

from typing import Any

import torch

from liger_fx.kernels import norm
from liger_fx.kernels.launch import compute_dtype
from liger_fx.kernels.layout import as_wide, empty_rows_like, laid_out
from liger_fx.kernels.library import (
    below_autograd,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)


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
    """The same in fewer passes, which nothing differentiates. (F.rms_norm takes twice the time of a
    short row's.)"""
    dtype = compute_dtype(x, weight)
    wide = as_wide(x, dtype)
    y = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if weight is not None:
        weight = as_wide(weight, dtype)
        y.mul_(weight + offset if offset else weight)
    return as_wide(y, out_dtype or x.dtype)


def rms_norm_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and weight by the formulas above, in PyTorch's own operations.

    more: a gradient that x has from elsewhere, to which this one is added.
    """
    dtype = compute_dtype(x, weight)
    wide, grad = x.to(dtype), dy.to(dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * r
    g = grad if weight is None else grad * (weight.to(dtype) + offset)
    dx = r * (g - normed * (g * normed).mean(-1, keepdim=True))
    dx = (dx if more is None else dx.add_(more)).to(x.dtype)
    if weight is None:
        return dx, None
    return dx, (grad * normed).sum_to_size(weight.shape).to(weight.dtype)


def norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if norm.fits(x, weight):
        return norm.forward(x, weight, None, eps, offset, out_dtype, centered=False)
    return laid_out(_by_pytorch(x, weight, eps, offset, out_dtype), x)


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
    dx, dw = norm_backward_fake(dy, x, weight, eps, offset, weight_grad)
    if norm.fits(x, dy, weight, more):
        asked = dw if weight_grad else None
        norm.backward(dy, x, weight, eps, offset, False, dx, asked, None, more)
        return dx, dw
    plain, plain_dw = rms_norm_backward_reference(dy, x, weight, eps, offset, more)
    return laid_out(plain, x), plain_dw if plain_dw is not None and weight_grad else dw


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
    norm_forward,
    lambda x, weight, eps, offset, out_dtype: empty_rows_like(x, out_dtype),
)
rms_norm_backward = define_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, float offset,"
    " bool weight_grad) -> (Tensor, Tensor)",
    norm_backward,
    norm_backward_fake,
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        eps, offset = ctx.constants
        return rms_norm_reference(x, weight, eps, offset, dy.dtype)

    grads = gradients_of(plain, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:2])
    return *grads, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.constants = eps, offset
        return below_autograd(_rms_norm, x, weight, eps, offset, out_dtype)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight_grad = ctx.needs_input_grad[1]
        dx, dw = rms_norm_backward(dy, *ctx.saved_tensors, *ctx.constants, weight_grad)
        return dx, dw if weight_grad else None, None, None, None


differentiate(_rms_norm, _RMSNorm, rms_norm_reference)
