"""The experts of a mixture: each token through a few gated MLPs, weighted and summed.

    out[t] = sum over j of weights[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t])), e = index[t, j]

Shazeer et al., "Outrageously Large Neural Networks", 2017. The tokens are laid out as rows in the
order of their experts (`expert_rows.py`), and one grouped product of PyTorch's serves all experts:

    rows    = x spread                              (tokens * k, hidden)
    gate_up = rows W_gate_up^T, product = act(gate) * up, y = product W_down^T
    out     = y gathered, weighted

With g the gradient of out, spread, and u = g W_down:

    dweights = sum(u * product), dproduct = weights * u, dW_down = g^T (weights * product)

so that the weights' gradient needs no y: what is kept for the backward is x and gate_up. Eager
keeps rows, gate_up, the activation, the product and y, four times as much where experts are narrow
(768 of 2048), twice where they are wide (14336 of 4096). The rows are spread again from x, and the
product is made again from gate_up by the kernel of its gradients, which reads that anyway.
"""

from typing import Any

import torch

from liger_fx.kernels.activation import check_activation
from liger_fx.kernels.expert_rows import gated_gradients, gather_into, spread
from liger_fx.kernels.gated_activation import halves, packed_gated_activation_reference, product_of
from liger_fx.kernels.launch import compute_dtype
from liger_fx.kernels.library import (
    Compute,
    InSteps,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.products import grouped_outer, grouped_product

Two = tuple[torch.Tensor, torch.Tensor]
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
    transposed: bool = False,
) -> torch.Tensor:
    """The sum of what each token's experts make of it, times their weights.

    x: (tokens, hidden). index: (tokens, k), whole numbers below `experts`. weights: (tokens, k).
    gate_up_proj: (experts, 2 * width, hidden), gate before up; down_proj: (experts, hidden, width);
    if `transposed`, (experts, hidden, 2 * width) and (experts, width, hidden). activation: one of
    ACTIVATIONS. The products are in the dtype of the two, which must be one. Returns (tokens,
    hidden) in x's dtype: sums in float32 (float64 where there is any), rounded once.
    Gradients for x, weights, gate_up_proj and down_proj; second derivatives go through
    `experts_reference`. ValueError for an unknown activation and shapes or dtypes that do not fit.
    """
    check_activation(activation)
    number, hidden, _ = experts_sizes(gate_up_proj, down_proj, transposed)
    if index.dim() != 2 or index.shape != weights.shape or x.shape != (index.shape[0], hidden):
        raise ValueError(
            f"experts: x {tuple(x.shape)}, index {tuple(index.shape)} and weights "
            f"{tuple(weights.shape)} do not fit each other and {hidden} inputs"
        )
    place, offsets = _in_order(index, number)
    out: torch.Tensor = _experts(
        x, weights, gate_up_proj, down_proj, place, offsets, activation, transposed
    )[0]
    return out


def experts_sizes(
    gate_up_proj: torch.Tensor, down_proj: torch.Tensor, transposed: bool
) -> tuple[int, int, int]:
    """How many experts there are, how wide what goes in is, and how wide they are inside.

    ValueError for parameters that do not fit each other.
    """
    into, out_of = _as_factors(gate_up_proj, down_proj, transposed)
    number, hidden, both = into.shape
    if both % 2 or out_of.shape != (number, both // 2, hidden):
        raise ValueError(
            f"experts: gate_up_proj {tuple(gate_up_proj.shape)} does not fit down_proj "
            f"{tuple(down_proj.shape)}"
        )
    if gate_up_proj.dtype is not down_proj.dtype:
        raise ValueError(
            f"experts: gate_up_proj is {gate_up_proj.dtype} and down_proj {down_proj.dtype}"
        )
    return number, hidden, both // 2


def _in_order(index: torch.Tensor, number: int) -> Two:
    """Where each row of a token lies in the order of experts, and where each expert's rows end."""
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    numbers = torch.arange(order.shape[0], device=order.device)
    place = torch.empty_like(order).scatter(0, order, numbers).view(index.shape)
    every = torch.arange(number, device=chosen.device, dtype=chosen.dtype)
    return place, torch.searchsorted(chosen, every, right=True, out_int32=True)


def _as_factors(gate_up_proj: torch.Tensor, down_proj: torch.Tensor, transposed: bool) -> Two:
    """The matrices as rows are multiplied with them."""
    if transposed:
        return gate_up_proj, down_proj
    return gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)


def experts_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    place: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    transposed: bool,
) -> Two:
    """What the operator computes, in PyTorch's own operations, none of which depends on how many
    rows an expert has: each row is multiplied with a copy of its expert's matrices.
    """
    into, out_of = _as_factors(gate_up_proj, down_proj, transposed)
    own = torch.searchsorted(offsets, place.reshape(-1), right=True)
    rows = x.to(into.dtype).unsqueeze(1).expand(-1, place.shape[1], -1).reshape(-1, 1, x.shape[1])
    gate_up = torch.bmm(rows, into[own])
    product = packed_gated_activation_reference(gate_up, activation)
    y = torch.bmm(product, out_of[own]).view(*place.shape, -1)
    dtype = compute_dtype(x, y, weights)
    out = (y.to(dtype) * weights.to(dtype).unsqueeze(-1)).sum(1).to(x.dtype)
    return out, gate_up.squeeze(1)[place.reshape(-1).argsort()]


def _begin(
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    place: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    transposed: bool,
) -> Two:
    """Room for the result, and gate_up for the backward."""
    into, _ = _as_factors(gate_up_proj, down_proj, transposed)
    return x.new_empty(x.shape), grouped_product(spread(x, place, into.dtype), into, offsets)


def _finish(
    results: Two,
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    place: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    transposed: bool,
) -> None:
    """The result, of gate_up."""
    out, gate_up = results
    _, out_of = _as_factors(gate_up_proj, down_proj, transposed)
    product = product_of(*halves(gate_up, True), activation)
    gather_into(out, grouped_product(product, out_of, offsets), place, weights)


def _fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    place: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    transposed: bool,
) -> Two:
    into, _ = _as_factors(gate_up_proj, down_proj, transposed)
    return x.new_empty(x.shape), into.new_empty((place.numel(), into.shape[2]))


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    place: torch.Tensor,
    offsets: torch.Tensor,
    gate_up: torch.Tensor,
    activation: str,
    transposed: bool,
    x_grad: bool,
    gate_up_grad: bool,
    down_grad: bool,
) -> Grads:
    """The gradients of x, weights, gate_up_proj and down_proj, of no elements where the flags say
    that they are not wanted."""
    dx, ddown, dinto = x.new_empty(0), gate_up.new_empty(0), gate_up.new_empty(0)
    into, out_of = _as_factors(gate_up_proj, down_proj, transposed)
    grad_rows = spread(dout, place, gate_up.dtype)
    product = grouped_product(grad_rows, out_of.transpose(1, 2), offsets)
    dgate_up, dweights = gated_gradients(product, gate_up, place, weights, activation)
    if down_grad:
        pair = (product, grad_rows) if transposed else (grad_rows, product)
        ddown = grouped_outer(*pair, offsets)
    del grad_rows, product
    if gate_up_grad:
        rows = spread(x, place, gate_up.dtype)
        dinto = grouped_outer(*((rows, dgate_up) if transposed else (dgate_up, rows)), offsets)
        del rows
    if x_grad:
        dx = x.new_empty(x.shape)
        gather_into(dx, grouped_product(dgate_up, into.transpose(1, 2), offsets), place, None)
    return dx, dweights, dinto, ddown


def _backward_fake(
    dout: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    place: torch.Tensor,
    offsets: torch.Tensor,
    gate_up: torch.Tensor,
    activation: str,
    transposed: bool,
    x_grad: bool,
    gate_up_grad: bool,
    down_grad: bool,
) -> Grads:
    return (
        x.new_empty(x.shape if x_grad else 0),
        weights.new_empty(weights.shape),
        gate_up.new_empty(gate_up_proj.shape if gate_up_grad else 0),
        gate_up.new_empty(down_proj.shape if down_grad else 0),
    )


_ARGUMENTS = (
    "Tensor x, Tensor weights, Tensor gate_up_proj, Tensor down_proj, Tensor place, Tensor offsets"
)
_experts = define_op(
    f"experts({_ARGUMENTS}, str activation, bool transposed) -> (Tensor, Tensor)",
    InSteps(_begin, _finish),
    _fake,
)
_experts_backward = define_op(
    f"experts_backward(Tensor dout, {_ARGUMENTS}, Tensor gate_up, str activation, bool transposed,"
    " bool x_grad, bool gate_up_grad, bool down_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _again(ctx: Any, dout: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    *inputs, place, offsets, _ = ctx.saved_tensors

    def plain(
        x: torch.Tensor, weights: torch.Tensor, into: torch.Tensor, out_of: torch.Tensor
    ) -> Any:
        return experts_reference(x, weights, into, out_of, place, offsets, *ctx.constants)[0]

    return *gradients_of(plain, inputs, (dout,), ctx.needs_input_grad[:4]), *(None,) * 5


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        place: torch.Tensor,
        offsets: torch.Tensor,
        activation: str,
        transposed: bool,
        compute: Compute,
    ) -> Two:
        inputs = (x, weights, gate_up_proj, down_proj, place, offsets)
        out, gate_up = compute(*inputs, activation, transposed)
        ctx.save_for_backward(*inputs, gate_up)
        ctx.constants = activation, transposed
        ctx.mark_non_differentiable(gate_up)
        ctx.set_materialize_grads(False)
        return out, gate_up

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dout: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x_grad, weights_grad, gate_up_grad, down_grad, *_ = ctx.needs_input_grad
        dx, dweights, dinto, ddown = _experts_backward(
            dout, *ctx.saved_tensors, *ctx.constants, x_grad, gate_up_grad, down_grad
        )
        return (
            dx if x_grad else None,
            dweights if weights_grad else None,
            dinto if gate_up_grad else None,
            ddown if down_grad else None,
            *(None,) * 5,
        )


differentiate(_experts, _Experts, experts_reference)
