"""A gradient that is differentiated itself: that of the plain reference, or an error; never zero
where no operation happens to have a derivative."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import liger_fx.kernels
from liger_fx.kernels.activation import ACTIVATIONS, activation, activation_reference
from liger_fx.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from liger_fx.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from liger_fx.kernels.experts import experts
from liger_fx.kernels.gated_activation import (
    gated_activation,
    gated_activation_reference,
    packed_gated_activation,
    packed_gated_activation_reference,
)
from liger_fx.kernels.gated_linear import gated_linear, gated_linear_reference
from liger_fx.kernels.layer_norm import layer_norm, layer_norm_reference
from liger_fx.kernels.linear_cross_entropy import linear_cross_entropy
from liger_fx.kernels.lora_linear import lora_linear, lora_linear_reference
from liger_fx.kernels.qk_norm_rope import qk_norm_rope
from liger_fx.kernels.rms_norm import rms_norm, rms_norm_reference
from liger_fx.kernels.rope import Form as Turn
from liger_fx.kernels.rope import rope, rope_pair, rope_reference
from tests.kernels.accuracy import relative_error

Function = Callable[..., Any]
SHAPE = (2, 3, 5, 8)  # batch, heads, tokens, width
SMOOTH = [name for name in ACTIVATIONS if name != "relu"]


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))
    return cos, sin


def turned(turn: Function) -> Function:
    def call(*tensors: torch.Tensor) -> Any:
        cos, sin = (table.to(tensors[0].device) for table in tables())
        return turn(*tensors, cos, sin)

    return call


def index_of(x: torch.Tensor) -> torch.Tensor:
    """Two experts for each token: 0 and 2, 1 and 0, 2 and 1, ..."""
    token = torch.arange(x.shape[0], device=x.device)
    return torch.stack((token % 3, (token + 2) % 3), -1)


def experts_one_by_one(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, into: Any, out_of: Any
) -> torch.Tensor:
    total = torch.zeros_like(x)
    for expert in range(into.shape[0]):
        weight = (weights * (index == expert)).sum(-1, keepdim=True)
        product = packed_gated_activation_reference(x @ into[expert].t(), "silu")
        total = total + weight * (product @ out_of[expert].t())
    return total


def normed_and_turned(q: Any, k: Any, a: Any, b: Any, cos: Any, sin: Any) -> Any:
    pairs = ((q, a), (k, b))
    return tuple(rope_reference(rms_norm_reference(x, w, 1e-5), cos, sin, Turn()) for x, w in pairs)


# name -> the operator's Function, the operator and its reference, as functions of tensors of these
# shapes
CASES: dict[str, tuple[str, tuple[tuple[int, ...], ...], Function, Function]] = {
    "rms_norm": (
        "_RMSNorm", (SHAPE, (8,)),
        lambda x, w: rms_norm(x, w, 1e-5, 1.0), lambda x, w: rms_norm_reference(x, w, 1e-5, 1.0),
    ),
    "rms_norm without weight": (
        "_RMSNorm", (SHAPE,),
        lambda x: rms_norm(x, None, 1e-5), lambda x: rms_norm_reference(x, None, 1e-5),
    ),
    "add_rms_norm": (
        "_AddRMSNorm", (SHAPE, SHAPE, (8,)),
        lambda a, b, w: add_rms_norm(a, b, w, 1e-5),
        lambda a, b, w: add_rms_norm_reference(a, b, w, 1e-5),
    ),
    "add_rms_norm, the norm alone": (
        "_AddRMSNorm", (SHAPE, SHAPE),
        lambda a, b: add_rms_norm(a, b, None, 1e-5)[0],
        lambda a, b: add_rms_norm_reference(a, b, None, 1e-5)[0],
    ),
    "layer_norm": (
        "_LayerNorm", (SHAPE, (8,), (8,)),
        lambda x, w, b: layer_norm(x, w, b, 1e-2, 1.0),
        lambda x, w, b: layer_norm_reference(x, w, b, 1e-2, 1.0),
    ),
    "layer_norm without weight and bias": (
        "_LayerNorm", (SHAPE,),
        lambda x: layer_norm(x, None, None, 1e-2),
        lambda x: layer_norm_reference(x, None, None, 1e-2),
    ),
    "add_layer_norm": (
        "_AddLayerNorm", (SHAPE, SHAPE, (8,), (8,)),
        lambda a, b, w, c: add_layer_norm(a, b, w, c, 1e-2),
        lambda a, b, w, c: add_layer_norm_reference(a, b, w, c, 1e-2),
    ),
    "add_layer_norm, the norm alone": (
        "_AddLayerNorm", (SHAPE, SHAPE),
        lambda a, b: add_layer_norm(a, b, None, None, 1e-2)[0],
        lambda a, b: add_layer_norm_reference(a, b, None, None, 1e-2)[0],
    ),
    **{
        f"activation {name}": (
            "_Activation", (SHAPE,),
            lambda x, name=name: activation(x, name),
            lambda x, name=name: activation_reference(x, name),
        )
        for name in SMOOTH
    },
    "gated_activation": (
        "_GatedActivation", (SHAPE, SHAPE),
        lambda g, u: gated_activation(g, u, "silu"),
        lambda g, u: gated_activation_reference(g, u, "silu"),
    ),
    "packed_gated_activation": (
        "_PackedGatedActivation", (SHAPE,),
        lambda x: packed_gated_activation(x, "gelu_tanh", False),
        lambda x: packed_gated_activation_reference(x, "gelu_tanh", False),
    ),
    "gated_linear": (
        "_GatedLinear", (SHAPE, SHAPE, (4, 8), (4,)),
        lambda g, u, w, b: gated_linear(g, u, w, b, "silu", True),
        lambda g, u, w, b: gated_linear_reference(g, u, w, b, "silu", True),
    ),
    "gated_linear, packed": (
        "_GatedLinear", (SHAPE, (6, 4)),
        lambda x, w: gated_linear(x, None, w, None, "gelu", False),
        lambda x, w: gated_linear_reference(x, None, w, None, "gelu", False),
    ),
    "experts": (
        "_Experts", ((6, 8), (6, 2), (3, 10, 8), (3, 8, 5)),
        lambda x, w, a, b: experts(x, index_of(x), w, a / 3, b / 3, "silu"),
        lambda x, w, a, b: experts_one_by_one(x, index_of(x), w, a / 3, b / 3),
    ),
    "lora_linear": (
        "_LoraLinear", (SHAPE, SHAPE, (2, 8), (6, 2)),
        lambda x, d, a, b: lora_linear(x, d, frozen(x), None, a, b, 0.5),
        lambda x, d, a, b: lora_linear_reference(x, d, frozen(x), None, a, b, 0.5)[0],
    ),
    "rope": (
        "_Rope", (SHAPE,),
        turned(lambda x, cos, sin: rope(x, cos, sin)),
        turned(lambda x, cos, sin: rope_reference(x, cos, sin, Turn())),
    ),
    "qk_norm_rope": (
        "_QKNormRope", (SHAPE, SHAPE, (8,), (8,)),
        turned(lambda q, k, a, b, cos, sin: qk_norm_rope(q, k, a, b, cos, sin, 1e-5)),
        turned(lambda q, k, a, b, cos, sin: normed_and_turned(q, k, a, b, cos, sin)),
    ),
    "qk_norm_rope, one tensor": (
        "_QKNormRope", (SHAPE, (8,)),
        turned(lambda q, a, cos, sin: qk_norm_rope(q, None, a, None, cos, sin, 1e-5)[0]),
        turned(lambda q, a, cos, sin: normed_and_turned(q, q, a, a, cos, sin)[0]),
    ),
    "rope_pair": (
        "_RopePair", (SHAPE, SHAPE),
        turned(lambda q, k, cos, sin: rope_pair(q, k, cos, sin)),
        turned(lambda q, k, cos, sin: tuple(rope_reference(x, cos, sin, Turn()) for x in (q, k))),
    ),
}  # fmt: skip


def frozen(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, 48, device=x.device).view(6, 8).to(x.dtype)


def given(shapes: tuple[tuple[int, ...], ...], device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def parts(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def summed(of: Callable[[torch.Tensor], torch.Tensor], tensors: Iterable[Any]) -> Any:
    return sum(of(t).sum() for t in tensors)


def square(t: torch.Tensor) -> torch.Tensor:
    return t.square()


def of_a_sum(function: Function, inputs: list[torch.Tensor]) -> Any:
    """A penalty on the gradient of a sum: what comes in requires no gradient."""
    total = summed(lambda t: t, parts(function(*inputs)))
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    penalty = summed(square, grads)
    if not penalty.requires_grad:  # of a rotation
        return grads
    return grads, torch.autograd.grad(penalty, inputs, allow_unused=True)


def of_squares(function: Function, inputs: list[torch.Tensor]) -> Any:
    total = summed(square, parts(function(*inputs)))
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    return grads, torch.autograd.grad(summed(torch.sin, grads), inputs)


def by_backward(function: Function, inputs: list[torch.Tensor]) -> Any:
    summed(torch.sin, parts(function(*inputs))).backward(create_graph=True)
    first = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    summed(square, first).backward()
    return first, [x.grad for x in inputs]


def of_inputs_that_depend_on_each_other(function: Function, inputs: list[torch.Tensor]) -> Any:
    first, *others = inputs
    own = [first.sin(), *(x * first.mean() for x in others)]
    total = summed(square, parts(function(*own)))
    (grad,) = torch.autograd.grad(total, first, create_graph=True)
    return grad, torch.autograd.grad(grad.square().sum(), inputs)


def hessian(function: Function, inputs: list[torch.Tensor]) -> Any:
    first, *others = (x[:1] if x.dim() == 4 else x for x in inputs)

    def total(x: torch.Tensor) -> Any:
        return summed(square, parts(function(x, *others)))

    return torch.autograd.functional.hessian(total, first)


def third(function: Function, inputs: list[torch.Tensor]) -> Any:
    total = summed(square, parts(function(*inputs)))
    for _ in range(2):
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        total = summed(square, grads)
    return torch.autograd.grad(total, inputs)


# Three units in the last place: the reference's own error may be 0 by luck.
SLACK = 3.6e-7
WAYS = (of_a_sum, of_squares, by_backward, of_inputs_that_depend_on_each_other, hessian, third)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_the_reference(case: str, way: Any, device: str) -> None:
    name, shapes, ours, reference = CASES[case]
    inputs = given(shapes, device)
    assert type(parts(ours(*inputs))[0].grad_fn).__name__ == f"{name}Backward"
    exact = tree_leaves(way(reference, [x.detach().double().requires_grad_() for x in inputs]))
    found, plain = (tree_leaves(way(f, given(shapes, device))) for f in (ours, reference))
    for mine, other, true in zip(found, plain, exact, strict=True):
        assert (mine is None) == (other is None)
        if mine is None:
            continue
        assert mine.shape == true.shape and mine.dtype == other.dtype
        assert relative_error(mine, true) <= 2 * relative_error(other, true) + SLACK


def loss(h: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 1, 40, device=h.device).view(5, 8)
    return linear_cross_entropy(h, weight, torch.arange(6, device=h.device) % 5)


@pytest.mark.parametrize("factor", ["number", "tensor"])
def test_the_loss_refuses_it(factor: str, device: str) -> None:
    (h,) = given(((6, 8),), device)
    scale = given(((),), device)[0] if factor == "tensor" else 2.0
    (grad,) = torch.autograd.grad(loss(h) * scale, h, create_graph=True)
    (plain,) = torch.autograd.grad(loss(h) * scale, h)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        grad.square().sum().backward()


def test_every_function_of_the_folder_has_a_case() -> None:
    found = set()
    for file in pkgutil.iter_modules(liger_fx.kernels.__path__):
        module = importlib.import_module(f"liger_fx.kernels.{file.name}")
        found |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.autograd.Function)
        }
    assert found == {name for name, *_ in CASES.values()} | {"_LinearCrossEntropy"}
