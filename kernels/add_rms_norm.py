"""A residual connection and the RMSNorm behind it: both the sum and its norm are wanted.

    s = a + b; y = rms_norm(s, weight, eps, offset)
    ->  y, s = add_rms_norm(a, b, weight, eps, offset)      s is written once and not read again

The norm is that of the sum as it is rounded to its dtype, so that both results are those of the two
operations one after the other. With ds and dy the gradients of the two, the sum's is

    da = db = ds + rms_norm_backward(dy, s, weight)         added in float32, rounded once
"""

from collections.abc import Callable
from typing import Any

import torch

from liger_fx.kernels import norm
from liger_fx.kernels.library import (
    Compute,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.replay import Replayed
from liger_fx.kernels.rms_norm import (
    norm_backward,
    norm_backward_fake,
    norm_by_pytorch,
    norm_forward,
    rms_norm_backward,
    rms_norm_reference,
)

Two = tuple[torch.Tensor, torch.Tensor]


def add_rms_norm(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Two:
    """y = rms_norm(s, weight, eps, offset, out_dtype) of s = a + b, and s.

    a, b: (..., width), of one shape and dtype, any strides. The rest is as `rms_norm` has it; s has
    the values and strides of torch.add. ValueError for other shapes or dtypes.
    Gradients: a and b get one and the same tensor; either result may have none.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"add_rms_norm: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)} differ"
        )
    if weight is not None and (weight.dim() != 1 or weight.size(0) != a.size(-1)):
        raise ValueError(
            f"add_rms_norm: weight must have shape ({a.shape[-1]},), not {tuple(weight.shape)}"
        )
    y, s = _add_rms_norm(a, b, weight, eps, offset, out_dtype)
    return y, s


def add_rms_norm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Two:
    """What `add_rms_norm` computes, in PyTorch's own operations."""
    s = torch.add(a, b)
    return rms_norm_reference(s, weight, eps, offset, out_dtype), s


def _forward(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> Two:
    if norm.fits_sum(a, b, weight):
        return norm.forward_of_sum(a, b, weight, None, eps, offset, out_dtype, centered=False)
    s = torch.add(a, b)
    return norm_forward(s, weight, eps, offset, out_dtype), s


def _by_pytorch(a: torch.Tensor, b: torch.Tensor, *given: Any) -> Two:
    s = torch.add(a, b)
    return norm_by_pytorch(s, *given), s


def _backward(ds: torch.Tensor, *given: Any) -> Two:
    backward: Callable[..., Two] = norm_backward
    return backward(*given, more=ds)


def _backward_fake(ds: torch.Tensor, *given: Any) -> Two:
    return norm_backward_fake(*given)


_add_rms_norm = define_op(
    "add_rms_norm(Tensor a, Tensor b, Tensor? weight, float eps, float offset,"
    " ScalarType? out_dtype) -> (Tensor, Tensor)",
    Replayed(_forward, _by_pytorch),
    norm.fake_of_sum,
)
_add_rms_norm_backward = define_op(
    "add_rms_norm_backward(Tensor ds, Tensor dy, Tensor s, Tensor? weight, float eps,"
    " float offset, bool weight_grad) -> (Tensor, Tensor)",
    Replayed(_backward),
    _backward_fake,
)


def _again(
    ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    def plain(s: torch.Tensor, weight: torch.Tensor | None) -> Two:
        eps, offset = ctx.constants
        return rms_norm_reference(s, weight, eps, offset, None if dy is None else dy.dtype), s

    a, b, weight, *_ = ctx.needs_input_grad
    dx, dw = gradients_of(plain, ctx.saved_tensors, (dy, ds), (a or b, weight))
    return dx if a else None, dx if b else None, dw, *(None,) * 4


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype | None,
        compute: Compute,
    ) -> Two:
        y, s = compute(a, b, weight, eps, offset, out_dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, weight)
        ctx.constants = eps, offset
        return y, s

    @staticmethod
    @differentiable(_again)
    def backward(
        ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:  # the sum alone was used
            return ds, ds, *(None,) * 5
        weight_grad = ctx.needs_input_grad[2]
        given = (*ctx.saved_tensors, *ctx.constants, weight_grad)
        if ds is None:
            dx, dw = rms_norm_backward(dy, *given)
        else:
            dx, dw = _add_rms_norm_backward(ds, dy, *given)
        return dx, dx, dw if weight_grad else None, *(None,) * 4


differentiate(_add_rms_norm, _AddRMSNorm, add_rms_norm_reference)
