"""A gated product and the linear layer after it, which keep what the product is made of and not the
product.

    product = activation(gate) * up; y = F.linear(product, weight, bias)
    ->  y = gated_linear(gate, up, weight, bias, "silu")

The layer's own backward needs the product for the weight's gradient; gate and up are kept for the
activation's anyway. The kernel of the gradients of gate and up has all that the product takes, and
leaves it in the memory of the gradient that it reads: one more write (0.04 ms for 8192 rows of 8192
on an H100) instead of a third of what the MLP keeps.
"""

from typing import Any

import torch
import torch.nn.functional as F

from liger_fx.kernels.gated_activation import (
    gated_activation_reference,
    gradients_and_product,
    halves,
    product_of,
)
from liger_fx.kernels.library import (
    Compute,
    InSteps,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.products import linear_into

Optional = torch.Tensor | None
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def gated_linear(
    gate: torch.Tensor,
    up: Optional,
    weight: torch.Tensor,
    bias: Optional,
    activation: str,
    gate_first: bool = True,
) -> torch.Tensor:
    """activation(gate) * up, through a linear layer.

    gate, up: (..., width) of one shape and dtype; with up None gate holds both, (..., 2 width),
    gate first or last. weight: (out, width), bias: (out,), of gate's dtype. Returns (..., out).
    Gradients for all four; second derivatives go through `gated_linear_reference`. ValueError for
    a product that does not fit the weight.
    """
    width = gate.shape[-1] // (2 if up is None else 1)
    if weight.shape[1:] != (width,) or weight.dtype is not gate.dtype:
        raise ValueError(
            f"gated_linear: a product {width} wide of {gate.dtype} does not fit a weight of "
            f"{tuple(weight.shape)}, {weight.dtype}"
        )
    y: torch.Tensor = _gated_linear(gate, up, weight, bias, activation, gate_first)
    return y


def _parts(gate: torch.Tensor, up: Optional, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return halves(gate, gate_first) if up is None else (gate, up)


def gated_linear_reference(
    gate: torch.Tensor,
    up: Optional,
    weight: torch.Tensor,
    bias: Optional,
    activation: str,
    gate_first: bool,
) -> torch.Tensor:
    """What `gated_linear` computes, in PyTorch's own operations."""
    product = gated_activation_reference(*_parts(gate, up, gate_first), activation)
    return F.linear(product, weight, bias)


def _begin(gate: torch.Tensor, up: Optional, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]))


def _finish(
    y: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    weight: torch.Tensor,
    bias: Optional,
    activation: str,
    gate_first: bool,
) -> None:
    product = product_of(*_parts(gate, up, gate_first), activation)
    linear_into(_rows(y), _rows(product), weight, bias)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    weight: torch.Tensor,
    activation: str,
    gate_first: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> Grads:
    """The gradients of gate, up, weight and bias, of no elements where they are not wanted."""
    dgate, dup, dw, db = _backward_fake(
        dy, gate, up, weight, activation, gate_first, weight_grad, bias_grad
    )
    rows = _rows(dy)
    product = (rows @ weight).view(*dy.shape[:-1], weight.shape[1])
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    grads = halves(dgate, gate_first) if up is None else (dgate, dup)
    parts = _parts(gate, up, gate_first)
    gradients_and_product(product, *parts, grads, activation, again=weight_grad)
    if weight_grad:
        torch.mm(rows.t(), product.view(-1, weight.shape[1]), out=dw)
    if bias_grad:
        torch.sum(rows, 0, out=db)
    return dgate, dup, dw, db


def _backward_fake(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: Optional,
    weight: torch.Tensor,
    activation: str,
    gate_first: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> Grads:
    nothing = gate.new_empty(0)
    return (
        gate.new_empty(gate.shape),
        nothing if up is None else up.new_empty(up.shape),
        weight.new_empty(weight.shape if weight_grad else 0),
        weight.new_empty(weight.shape[0] if bias_grad else 0),
    )


_gated_linear = define_op(
    "gated_linear(Tensor gate, Tensor? up, Tensor weight, Tensor? bias, str activation,"
    " bool gate_first) -> Tensor",
    InSteps(_begin, _finish),
    _begin,
)
_gated_linear_backward = define_op(
    "gated_linear_backward(Tensor dy, Tensor gate, Tensor? up, Tensor weight, str activation,"
    " bool gate_first, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(gate: torch.Tensor, up: Optional, weight: torch.Tensor) -> torch.Tensor:
        return gated_linear_reference(gate, up, weight, None, *ctx.constants)

    *wanted, bias = ctx.needs_input_grad[:4]
    grads = gradients_of(plain, ctx.saved_tensors, (dy,), wanted)
    return *grads, dy.flatten(0, -2).sum(0) if bias else None, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: Optional,
        weight: torch.Tensor,
        bias: Optional,
        activation: str,
        gate_first: bool,
        compute: Compute,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.constants = activation, gate_first
        result: torch.Tensor = compute(gate, up, weight, bias, activation, gate_first)
        return result

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        grads = _gated_linear_backward(dy, *ctx.saved_tensors, *ctx.constants, *wanted[2:])
        return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 3)


differentiate(_gated_linear, _GatedLinear, gated_linear_reference)
