"""Any shape and any strides: the operators against their references, layouts chosen by Hypothesis.

Under Triton's interpreter and on a GPU this compares the kernels with PyTorch; elsewhere, the
derivatives that are written out with those that autograd finds.
"""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liger_fx.kernels.activation import activation, activation_reference
from liger_fx.kernels.gated_activation import (
    gated_activation,
    gated_activation_reference,
    packed_gated_activation,
    packed_gated_activation_reference,
)
from liger_fx.kernels.layer_norm import layer_norm, layer_norm_reference
from liger_fx.kernels.rms_norm import rms_norm, rms_norm_reference
from liger_fx.kernels.rope import Form, rope, rope_reference
from tests.kernels.accuracy import DEVICE, with_gradients

few = settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the poisoned memory
)


@st.composite
def views(draw: st.DrawFn, dims: tuple[int, int] = (1, 4), even: bool = False) -> torch.Tensor:
    """A tensor that is a permuted, sliced, stepped and maybe expanded part of another."""
    number = draw(st.integers(*dims))
    shape = [draw(st.integers(1, 5)) for _ in range(number - 1)]
    width = draw(st.integers(1, 20))
    shape.append(2 * width if even else width)
    steps = [draw(st.sampled_from((1, 1, 2))) for _ in shape]
    pads = [draw(st.integers(0, 2)) for _ in shape]
    order = draw(st.permutations(range(number)))
    outer = [shape[d] * steps[d] + pads[d] for d in order]
    x = torch.randn(outer, device=DEVICE).permute([order.index(d) for d in range(number)])
    for d in range(number):
        stop = pads[d] + shape[d] * steps[d]
        x = x[(slice(None),) * d + (slice(pads[d], stop, steps[d]),)]
    if number > 1 and draw(st.booleans()):
        return x[:1].expand(x.shape)
    return x


def like(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Random numbers in x's shape, in another order of dimensions in memory."""
    inverse = [order.index(d) for d in range(len(order))]
    return torch.randn([x.shape[d] for d in order], device=DEVICE).permute(inverse)


def agree(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@few
@given(views(), st.booleans(), st.data())
def test_rms_norm(x: torch.Tensor, scaled: bool, data: st.DataObject) -> None:
    grad = like(x, data.draw(st.permutations(range(x.dim()))))
    inputs = (x, torch.randn(x.shape[-1], device=DEVICE)) if scaled else (x,)
    agree(
        with_gradients(lambda x, w=None: rms_norm(x, w, 0.1, 1.0), inputs, grad),
        with_gradients(lambda x, w=None: rms_norm_reference(x, w, 0.1, 1.0), inputs, grad),
    )


@few
@given(views(), st.booleans(), st.data())
def test_layer_norm(x: torch.Tensor, scaled: bool, data: st.DataObject) -> None:
    grad = like(x, data.draw(st.permutations(range(x.dim()))))
    inputs = (x, *torch.randn(2, x.shape[-1], device=DEVICE)) if scaled else (x,)
    agree(
        with_gradients(lambda x, w=None, b=None: layer_norm(x, w, b, 0.1, 1.0), inputs, grad),
        with_gradients(
            lambda x, w=None, b=None: layer_norm_reference(x, w, b, 0.1, 1.0), inputs, grad
        ),
    )


@few
@given(views(), st.data())
def test_activations(x: torch.Tensor, data: st.DataObject) -> None:
    order = st.permutations(range(x.dim()))
    up, grad = like(x, data.draw(order)), like(x, data.draw(order))
    agree(
        with_gradients(lambda x: activation(x, "silu"), (x,), grad),
        with_gradients(lambda x: activation_reference(x, "silu"), (x,), grad),
    )
    agree(
        with_gradients(lambda x, up: gated_activation(x, up, "gelu"), (x, up), grad),
        with_gradients(lambda x, up: gated_activation_reference(x, up, "gelu"), (x, up), grad),
    )


@few
@given(views(even=True), st.booleans(), st.data())
def test_packed(x: torch.Tensor, gate_first: bool, data: st.DataObject) -> None:
    half = x[..., : x.shape[-1] // 2]
    grad = like(half, data.draw(st.permutations(range(x.dim()))))
    agree(
        with_gradients(lambda x: packed_gated_activation(x, "relu", gate_first), (x,), grad),
        with_gradients(
            lambda x: packed_gated_activation_reference(x, "relu", gate_first), (x,), grad
        ),
    )


@few
@given(views(dims=(4, 4), even=True), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_rope(
    x: torch.Tensor, source: bool, target: bool, half_tables: bool, data: st.DataObject
) -> None:
    width = 2 * data.draw(st.integers(1, x.shape[-1] // 2))
    batch = data.draw(st.sampled_from((1, x.shape[0])))
    shape = (batch, x.shape[2], width // 2 if half_tables else width)
    cos, sin = torch.randn(2, *shape, device=DEVICE)
    grad = like(x, data.draw(st.permutations(range(4))))
    form = Form(source, target, half_tables)
    flags: Any = {"interleaved_in": source, "interleaved_out": target, "half_tables": half_tables}
    agree(
        with_gradients(lambda x: rope(x, cos, sin, **flags), (x,), grad),
        with_gradients(lambda x: rope_reference(x, cos, sin, form), (x,), grad),
    )
