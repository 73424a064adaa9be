"""torch.func and forward mode: every operator gives what its plain reference gives, never zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from liger_fx.kernels.activation import activation, activation_reference
from liger_fx.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from liger_fx.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from liger_fx.kernels.experts import experts
from liger_fx.kernels.gated_activation import (
    gated_activation,
    gated_activation_reference,
    packed_gated_activation,
    packed_gated_activation_reference,
)
from liger_fx.kernels.layer_norm import layer_norm, layer_norm_reference
from liger_fx.kernels.linear_cross_entropy import (
    Form,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from liger_fx.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from liger_fx.kernels.rms_norm import rms_norm, rms_norm_reference
from liger_fx.kernels.rope import Form as Turn
from liger_fx.kernels.rope import rope, rope_pair, rope_reference

Function = Callable[..., torch.Tensor]
SHAPE = (2, 3, 5, 8)  # batch, heads, tokens, width
LABELS = torch.arange(30) % 5
FORM = Form(1.5, 5.0, 0.1, 0.01)
TABLES = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))


def turned(x: torch.Tensor, turn: Function) -> torch.Tensor:
    cos, sin = TABLES.to(x.device)
    return turn(x, cos, sin)


def expert_inputs(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any, Any, Any, Any]:
    """30 tokens with two of three experts each, which are 2 wide."""
    token = torch.arange(30, device=x.device)
    index = torch.stack((token % 3, (token + 1) % 3), -1)
    rows = y.reshape(30, 8)
    into, out_of = rows[:12].reshape(3, 4, 8) / 3, rows[12:18].reshape(3, 8, 2) / 3
    return x.reshape(30, 8), index, rows[:, :2], into, out_of


def experts_one_by_one(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, into: Any, out_of: Any
) -> torch.Tensor:
    total = torch.zeros_like(x)
    for expert in range(3):
        weight = (weights * (index == expert)).sum(-1, keepdim=True)
        product = packed_gated_activation_reference(x @ into[expert].t(), "silu")
        total = total + weight * (product @ out_of[expert].t())
    return total


# name -> the operator and its reference, as functions of one or two tensors of SHAPE
CASES: dict[str, tuple[int, Function, Function]] = {
    "rms_norm": (
        2,
        lambda x, y: rms_norm(x, y[0, 0, 0], 1e-5, 1.0),
        lambda x, y: rms_norm_reference(x, y[0, 0, 0], 1e-5, 1.0),
    ),
    "rms_norm without weight": (
        1, lambda x: rms_norm(x, None, 1e-5), lambda x: rms_norm_reference(x, None, 1e-5)
    ),
    "add_rms_norm": (
        2,
        lambda x, y: torch.stack(add_rms_norm(x, y, y[0, 0, 0], 1e-5, 1.0)),
        lambda x, y: torch.stack(add_rms_norm_reference(x, y, y[0, 0, 0], 1e-5, 1.0)),
    ),
    "layer_norm": (
        2,
        lambda x, y: layer_norm(x, y[0, 0, 0], y[1, 1, 1], 1e-5, 1.0),
        lambda x, y: layer_norm_reference(x, y[0, 0, 0], y[1, 1, 1], 1e-5, 1.0),
    ),
    "add_layer_norm": (
        2,
        lambda x, y: torch.stack(add_layer_norm(x, y, None, y[0, 0, 0], 1e-5)),
        lambda x, y: torch.stack(add_layer_norm_reference(x, y, None, y[0, 0, 0], 1e-5)),
    ),
    "rope": (
        1,
        lambda x: turned(x, lambda x, cos, sin: rope(x, cos, sin, interleaved_out=True)),
        lambda x: turned(x, lambda x, cos, sin: rope_reference(x, cos, sin, Turn(False, True))),
    ),
    "rope_pair": (
        2,
        lambda q, k: turned(q, lambda q, cos, sin: torch.stack(rope_pair(q, k, cos, sin))),
        lambda q, k: torch.stack(
            [turned(x, lambda x, cos, sin: rope_reference(x, cos, sin, Turn())) for x in (q, k)]
        ),
    ),
    "qk_norm_rope": (
        2,
        lambda q, k: turned(
            q,
            lambda q, cos, sin: torch.stack(
                qk_norm_rope(q, k, q[0, 0, 0], k[0, 0, 0], cos, sin, 1e-5, 1.0)
            ),
        ),
        lambda q, k: turned(
            q,
            lambda q, cos, sin: torch.stack(
                qk_norm_rope_reference(
                    q, k, q[0, 0, 0], k[0, 0, 0], cos, sin, 1e-5, 1.0, False, False, False,
                    q.dtype, q.dtype,
                )
            ),
        ),
    ),
    "gated_activation": (
        2,
        lambda x, y: gated_activation(x, y, "silu"),
        lambda x, y: gated_activation_reference(x, y, "silu"),
    ),
    "packed_gated_activation": (
        1,
        lambda x: packed_gated_activation(x, "gelu_tanh", False),
        lambda x: packed_gated_activation_reference(x, "gelu_tanh", False),
    ),
    "experts": (
        2,
        lambda x, y: experts(*expert_inputs(x, y), "silu"),
        lambda x, y: experts_one_by_one(*expert_inputs(x, y)),
    ),
    "linear_cross_entropy": (
        2,
        lambda x, y: linear_cross_entropy(x, y[0, 0], LABELS.to(x.device), form=FORM),
        lambda x, y: linear_cross_entropy_reference(
            x.flatten(0, 2), y[0, 0], None, LABELS.to(x.device), None, *FORM, torch.float32
        ),
    ),
    "activation": (
        1, lambda x: activation(x, "gelu"), lambda x: activation_reference(x, "gelu")
    ),
}  # fmt: skip


def some(count: int, seed: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SHAPE, generator=generator).to(device) for _ in range(count))


def total(function: Function) -> Function:
    """Curved in the result, so that second derivatives are not zero."""
    return lambda *args: function(*args).square().sum()


def jvp(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.jvp(function, inputs, tangents)


def grad(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.grad(total(function), tuple(range(len(inputs))))(*inputs)


def vmap(function: Function, inputs: Any, tangents: Any) -> Any:
    joined = [torch.stack(pair) for pair in zip(inputs, tangents, strict=True)]
    return torch.func.vmap(function)(*joined)


def hessian_vector(function: Function, inputs: Any, tangents: Any) -> Any:
    def gradient(*args: torch.Tensor) -> Any:
        return torch.func.grad(total(function), tuple(range(len(args))))(*args)

    return torch.func.jvp(gradient, inputs, tangents)


def gradients_by_sample(function: Function, inputs: Any, tangents: Any) -> Any:
    joined = [torch.stack(pair) for pair in zip(inputs, tangents, strict=True)]
    return torch.func.vmap(torch.func.grad(total(function)))(*joined)


def dual_numbers(function: Function, inputs: Any, tangents: Any) -> Any:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents)
        found = forward_ad.unpack_dual(function(*duals))
        assert found.tangent is not None, "the tangent was dropped"
        return tuple(found)


TRANSFORMS = (jvp, grad, vmap, hessian_vector, gradients_by_sample, dual_numbers)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_transform_sees_the_reference(case: str, transform: Any, device: str) -> None:
    count, ours, reference = CASES[case]
    inputs, tangents = some(count, 2, device), some(count, 3, device)
    found, wanted = (transform(f, inputs, tangents) for f in (ours, reference))
    torch.testing.assert_close(found, wanted)
    moving = [t for t in torch.utils._pytree.tree_leaves(found) if t.abs().max() > 0]
    assert len(moving) == len(torch.utils._pytree.tree_leaves(found))


def test_no_transform_is_left_behind(device: str) -> None:
    (x,) = some(1, 2, device)
    jvp(lambda x: activation(x, "silu"), (x,), (x,))
    y = activation(x.requires_grad_(), "silu")
    assert type(y.grad_fn).__name__ == "_ActivationBackward"
