"""A residual connection and the LayerNorm of its sum.

    s = a + b; y = layer_norm(s, weight, bias, eps, offset)
    ->  y, s = add_layer_norm(a, b, weight, bias, eps, offset)    s is written once, not read again

As add_rms_norm.py does for an RMSNorm: the norm is that of the sum as it is rounded to its dtype,
and the gradient that the sum has from elsewhere is added in the norm's backward.
"""

from collections.abc import Callable
from typing import Any

import torch

from liger_fx.kernels import norm
from liger_fx.kernels.layer_norm import (
    Three,
    check_factors,
    layer_norm_backward,
    layer_norm_reference,
    norm_backward,
    norm_backward_fake,
    norm_forward,
)
from liger_fx.kernels.library import (
    Compute,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.replay import Replayed

Two = tuple[torch.Tensor, torch.Tensor]


def add_layer_norm(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Two:
    """y = layer_norm(s, weight, bias, eps, offset, out_dtype) of s = a + b, and s.

    a, b: (..., width), of one shape and dtype, any strides. The rest is as `layer_norm` has it; s
    has the values and strides of torch.add. ValueError for other shapes or dtypes.
    Gradients: a and b get one and the same tensor; either result may have none.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"add_layer_norm: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)} differ"
        )
    check_factors("add_layer_norm", a, weight, bias)
    y, s = _add_layer_norm(a, b, weight, bias, eps, offset, out_dtype)
    return y, s


def add_layer_norm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Two:
    """What `add_layer_norm` computes, in PyTorch's own operations."""
    s = torch.add(a, b)
    return layer_norm_reference(s, weight, bias, eps, offset, out_dtype), s


def _forward(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> Two:
    if norm.fits_sum(a, b, weight, bias):
        return norm.forward_of_sum(a, b, weight, bias, eps, offset, out_dtype, centered=True)
    s = torch.add(a, b)
    return norm_forward(s, weight, bias, eps, offset, out_dtype), s


def _backward(ds: torch.Tensor, *given: Any) -> Three:
    backward: Callable[..., Three] = norm_backward
    return backward(*given, more=ds)


def _backward_fake(ds: torch.Tensor, *given: Any) -> Three:
    return norm_backward_fake(*given)


_add_layer_norm = define_op(
    "add_layer_norm(Tensor a, Tensor b, Tensor? weight, Tensor? bias, float eps, float offset,"
    " ScalarType? out_dtype) -> (Tensor, Tensor)",
    Replayed(_forward),
    norm.fake_of_sum,
)
_add_layer_norm_backward = define_op(
    "add_layer_norm_backward(Tensor ds, Tensor dy, Tensor s, Tensor? weight, Tensor? bias,"
    " float eps, float offset, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    Replayed(_backward),
    _backward_fake,
)


def _again(
    ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    def plain(s: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Two:
        eps, offset = ctx.constants
        return layer_norm_reference(
            s, weight, bias, eps, offset, None if dy is None else dy.dtype
        ), s

    a, b, weight, bias, *_ = ctx.needs_input_grad
    grads = gradients_of(plain, ctx.saved_tensors, (dy, ds), (a or b, weight, bias))
    return grads[0] if a else None, grads[0] if b else None, *grads[1:], *(None,) * 4


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype | None,
        compute: Compute,
    ) -> Two:
        y, s = compute(a, b, weight, bias, eps, offset, out_dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, weight, bias)
        ctx.constants = eps, offset
        return y, s

    @staticmethod
    @differentiable(_again)
    def backward(
        ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:  # the sum alone was used
            return ds, ds, *(None,) * 6
        _, _, weight_grad, bias_grad, *_ = ctx.needs_input_grad
        given = (*ctx.saved_tensors, *ctx.constants, weight_grad, bias_grad)
        if ds is None:
            dx, dw, dbias = layer_norm_backward(dy, *given)
        else:
            dx, dw, dbias = _add_layer_norm_backward(ds, dy, *given)
        dw, dbias = dw if weight_grad else None, dbias if bias_grad else None
        return dx, dx, dw, dbias, *(None,) * 4


differentiate(_add_layer_norm, _AddLayerNorm, add_layer_norm_reference)
