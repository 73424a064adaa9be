"""LayerNorm: of each row its mean is taken away, then it is divided by what is left's root mean
square, scaled and shifted.

    mean = x.mean(-1, keepdim=True); variance = (x - mean).pow(2).mean(-1, keepdim=True)
    y = (x - mean) * rsqrt(variance + eps) * (offset + weight) + bias
    ->  y = layer_norm(x, weight, bias, eps, offset)     one read of x, one write of y

Ba, Kiros & Hinton, "Layer Normalization", 2016. The kernels and the derivatives are in norm.py;
where these do not serve, PyTorch's own layer norm does, in float32 (or float64).
"""

from typing import Any

import torch
import torch.nn.functional as F

from liger_fx.kernels import norm
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

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = (x - mean) * rsqrt(variance + eps) * (offset + weight) + bias, in float32, rounded once.

    x: (..., width), any strides; weight, bias: (width,), or None for no multiplication (and no
    offset), no addition. The variance is that of the whole row, divided by its width.
    Returns (..., width) in `out_dtype` (x's by default), in x's order of dimensions in memory.
    Float64 is computed in float64. ValueError if the shape of weight or bias is not (width,).
    Gradients: x's in x's dtype; weight's and bias's in theirs, summed over the rows in float32, in
    an order that does not change from run to run. Second derivatives go through
    `layer_norm_reference`.
    """
    check_factors("layer_norm", x, weight, bias)
    return _layer_norm(x, weight, bias, eps, offset, out_dtype)


def check_factors(
    name: str, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """ValueError if the shape of weight or bias is not that of a row of x."""
    for role, factor in (("weight", weight), ("bias", bias)):
        if factor is not None and factor.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {role} must have shape ({x.shape[-1]},), not {tuple(factor.shape)}"
            )


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What `layer_norm` computes, in PyTorch's own operations."""
    dtype = compute_dtype(x, weight, bias)
    weight, bias = _wide(weight, dtype, offset), _wide(bias, dtype)
    y = F.layer_norm(as_wide(x, dtype), x.shape[-1:], weight, bias, eps)
    return as_wide(y, out_dtype or x.dtype)


def _wide(
    factor: torch.Tensor | None, dtype: torch.dtype, offset: float = 0.0
) -> torch.Tensor | None:
    if factor is None:
        return None
    factor = as_wide(factor, dtype)
    return factor + offset if offset else factor


def layer_norm_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_grad: bool,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and, if wanted, weight by the formulas of norm.py, in PyTorch's own
    operations.

    more: a gradient that x has from elsewhere, to which this one is added.
    """
    dtype = compute_dtype(x, weight)
    wide, grad = as_wide(x, dtype), as_wide(dy, dtype)
    # The forward's own r: how it was rounded changes y and dx alike, which the next norm undoes.
    _, mean, r = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    centered = wide - mean
    centered.sub_(centered.mean(-1, keepdim=True))  # what rounding left of it
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, centered, x.shape[-1:], torch.zeros_like(r), r, _wide(weight, dtype, offset), None,
        [True, False, False],
    )  # fmt: skip
    dx = as_wide(dx if more is None else dx.add_(more), x.dtype)
    if weight is None or not weight_grad:
        return dx, None
    dw = (grad * centered).mul_(r).sum_to_size(weight.shape)
    return dx, as_wide(dw, weight.dtype)


def norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if norm.fits(x, weight, bias):
        return norm.forward(x, weight, bias, eps, offset, out_dtype, centered=True)
    return laid_out(layer_norm_reference(x, weight, bias, eps, offset, out_dtype), x)


def norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
    more: torch.Tensor | None = None,
) -> Three:
    """dx, and dweight and dbias: of no elements unless they are wanted.

    more: a gradient that x has from elsewhere, to which this one is added.
    """
    dx, dw, dbias = norm_backward_fake(dy, x, weight, bias, eps, offset, weight_grad, bias_grad)
    if norm.fits(x, dy, weight, more):
        asked = dw if weight_grad else None, dbias if bias_grad else None
        norm.backward(dy, x, weight, eps, offset, True, dx, *asked, more)
        return dx, dw, dbias
    plain, plain_dw = layer_norm_backward_reference(dy, x, weight, eps, offset, weight_grad, more)
    if bias is not None and bias_grad:
        dbias = as_wide(as_wide(dy, compute_dtype(dy)).sum_to_size(bias.shape), bias.dtype)
    return laid_out(plain, x), dw if plain_dw is None else plain_dw, dbias


def norm_backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
    more: torch.Tensor | None = None,
) -> Three:
    dw, dbias = (
        x.new_empty(0) if factor is None or not wanted else factor.new_empty(factor.shape)
        for factor, wanted in ((weight, weight_grad), (bias, bias_grad))
    )
    return empty_rows_like(x), dw, dbias


_layer_norm = define_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset,"
    " ScalarType? out_dtype) -> Tensor",
    Replayed(norm_forward),
    lambda x, weight, bias, eps, offset, out_dtype: empty_rows_like(x, out_dtype),
)
layer_norm_backward = define_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps,"
    " float offset, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    Replayed(norm_backward),
    norm_backward_fake,
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        eps, offset = ctx.constants
        return layer_norm_reference(x, weight, bias, eps, offset, dy.dtype)

    grads = gradients_of(plain, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:3])
    return *grads, *(None,) * 4


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype | None,
        compute: Compute,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.constants = eps, offset
        return compute(x, weight, bias, eps, offset, out_dtype)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, weight_grad, bias_grad, *_ = ctx.needs_input_grad
        dx, dw, dbias = layer_norm_backward(
            dy, *ctx.saved_tensors, *ctx.constants, weight_grad, bias_grad
        )
        return dx, dw if weight_grad else None, dbias if bias_grad else None, *(None,) * 4


differentiate(_layer_norm, _LayerNorm, layer_norm_reference)
