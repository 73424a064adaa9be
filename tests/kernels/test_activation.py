"""The activations, alone and gated, against their definitions written here a second time."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liger_fx.kernels.activation import ACTIVATIONS, activation, activation_reference
from liger_fx.kernels.gated_activation import (
    gated_activation,
    gated_activation_reference,
    packed_gated_activation,
    packed_gated_activation_reference,
)
from liger_fx.kernels.launch import INTERPRETED
from tests.kernels.accuracy import (
    DTYPES,
    Draw,
    assert_as_accurate,
    doubled,
    drawing,
    far_apart,
    relative_error,
    with_gradients,
)

TEXTBOOK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "relu_squared": lambda x: torch.maximum(x, torch.zeros_like(x)) ** 2,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}

LAYOUTS: dict[str, Callable[[Draw], torch.Tensor]] = {
    "odd": lambda draw: draw(3, 5, 34),
    "more than one program": lambda draw: draw(3, 1700),
    "transposed": lambda draw: draw(2, 3, 4, 8).transpose(1, 2),
    "three strides": lambda draw: draw(4, 6, 8, 12)[::2, ::2, ::2, :6],
    "last dimension strided": lambda draw: draw(5, 66)[:, ::3],
    "last dimension first": lambda draw: draw(32, 6).t(),
    "one dimension": lambda draw: draw(70),
}

layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
names = pytest.mark.parametrize("name", ACTIVATIONS)


def twice(dtype: torch.dtype) -> Draw:
    """Numbers twice as large, to reach the bends of the activations."""
    draw = drawing(dtype)
    return lambda *shape: 2 * draw(*shape)


def product(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda gate, up: TEXTBOOK[name](gate) * up


def unpacked(name: str, gate_first: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(gate_up: torch.Tensor) -> torch.Tensor:
        first, second = gate_up.tensor_split(2, dim=-1)
        return product(name)(*((first, second) if gate_first else (second, first)))

    return function


@names
@dtypes
@layouts
def test_activation(name: str, dtype: torch.dtype, layout: str, device: str) -> None:
    x = LAYOUTS[layout](twice(dtype))
    grad = torch.randn(x.shape, device=device).to(dtype)
    ours = with_gradients(lambda x: activation(x, name), (x,), grad)
    eager = with_gradients(TEXTBOOK[name], (x,), grad)
    exact = with_gradients(TEXTBOOK[name], doubled((x,)), grad)
    assert_as_accurate(ours, eager, exact)
    assert ours[0].dtype == dtype
    assert ours[0].stride() == torch.empty_like(x).stride()


@names
@dtypes
@layouts
def test_gated(name: str, dtype: torch.dtype, layout: str, device: str) -> None:
    gate, up = (LAYOUTS[layout](twice(dtype)) for _ in range(2))
    grad = torch.randn(gate.shape, device=device).to(dtype)
    ours = with_gradients(lambda g, u: gated_activation(g, u, name), (gate, up), grad)
    eager = with_gradients(product(name), (gate, up), grad)
    exact = with_gradients(product(name), doubled((gate, up)), grad)
    assert_as_accurate(ours, eager, exact)


@names
@dtypes
@layouts
@pytest.mark.parametrize("gate_first", [True, False])
def test_packed(name: str, dtype: torch.dtype, layout: str, gate_first: bool, device: str) -> None:
    gate_up = LAYOUTS[layout](twice(dtype))
    grad = torch.randn(*gate_up.shape[:-1], gate_up.shape[-1] // 2, device=device).to(dtype)
    ours = with_gradients(lambda x: packed_gated_activation(x, name, gate_first), (gate_up,), grad)
    eager = with_gradients(unpacked(name, gate_first), (gate_up,), grad)
    exact = with_gradients(unpacked(name, gate_first), doubled((gate_up,)), grad)
    assert_as_accurate(ours, eager, exact)


@names
def test_float64_is_computed_in_float64(name: str, device: str) -> None:
    gate, up, grad = torch.randn(3, 5, 8, device=device, dtype=torch.float64)
    exact = with_gradients(product(name), (gate, up), grad)
    for function in (gated_activation, gated_activation_reference):
        ours = with_gradients(lambda g, u, f=function: f(g, u, name), (gate, up), grad)
        assert max(map(relative_error, ours, exact)) < 1e-14
    for packed in (packed_gated_activation, packed_gated_activation_reference):
        (y, _) = with_gradients(lambda x, f=packed: f(x, name), (torch.cat((gate, up), 1),), grad)
        assert relative_error(y, exact[0]) < 1e-14
    exact = with_gradients(TEXTBOOK[name], (gate,), grad)
    for alone in (activation, activation_reference):
        ours = with_gradients(lambda x, f=alone: f(x, name), (gate,), grad)
        assert max(map(relative_error, ours, exact)) < 1e-14


def test_gate_and_up_of_unlike_dtypes_and_strides(device: str) -> None:
    gate = torch.randn(4, 6, 8, device=device, dtype=torch.bfloat16)
    up, grad = torch.randn(6, 4, 8, device=device).transpose(0, 1), torch.randn(4, 6, 8)
    grad = grad.to(device)
    ours = with_gradients(lambda g, u: gated_activation(g, u, "silu"), (gate, up), grad)
    exact = with_gradients(product("silu"), doubled((gate, up)), grad)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.float32]
    assert_as_accurate(ours, exact, exact)


# What it is at 0, 200 and 30,000, and its derivative there.
EXTREMES = {
    "relu": ((0, 200, 3e4), (0, 1, 1)),
    "relu_squared": ((0, 4e4, 9e8), (0, 400, 6e4)),
    "sigmoid": ((0.5, 1, 1), (0.25, 0, 0)),
}
GELUS = ((0, 200, 3e4), (0.5, 1, 1))


@names
def test_extreme_values(name: str, device: str) -> None:
    """No overflow on the way where the result is representable; NaN stays NaN."""
    x = torch.tensor([-3e4, -200.0, -0.0, 0.0, 200.0, 3e4, float("nan")], device=device)
    y, dx = with_gradients(lambda x: activation(x, name), (x,), torch.ones_like(x))
    (zero, *values), (slope, *slopes) = EXTREMES.get(name, GELUS)
    expected = torch.tensor([0, 0, zero, zero, *values, float("nan")], device=device)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert dx[:6].tolist() == [0, 0, slope, slope, *slopes]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device)
    for out in with_gradients(lambda x: activation(x, "relu"), (x,), x):
        assert out.shape == shape
    for out in with_gradients(lambda g, u: gated_activation(g, u, "silu"), (x, x), x):
        assert out.shape == shape
    half = (*shape[:-1], shape[-1] // 2)
    y, dx = with_gradients(lambda x: packed_gated_activation(x, "silu"), (x,), x.new_empty(half))
    assert (y.shape, dx.shape) == (half, shape)


def test_keeps_its_inputs_alone(device: str) -> None:
    gate, up = torch.randn(2, 4, 8, device=device).requires_grad_().unbind()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_activation(gate, up, "gelu")
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_what_is_refused() -> None:
    x = torch.randn(4, 8)
    for call in (
        lambda: activation(x, "tanh"),
        lambda: gated_activation(x, x, "tanh"),
        lambda: packed_gated_activation(x, "tanh"),
    ):
        with pytest.raises(ValueError, match="unknown activation 'tanh': known are silu, gelu"):
            call()
    with pytest.raises(ValueError, match=r"\(4, 8\) and up \(4, 1\) differ in shape"):
        gated_activation(x, x[:, :1], "silu")
    with pytest.raises(ValueError, match="7 does not split in halves"):
        packed_gated_activation(x[:, :7], "silu")


@pytest.mark.skipif(not INTERPRETED, reason="about a Triton kernel on the CPU")
def test_rows_beyond_32_bits(tmp_path: Path) -> None:
    gate_up, grad = far_apart(tmp_path, 3, 32), torch.randn(3, 16)
    ours = with_gradients(lambda x: packed_gated_activation(x, "silu"), (gate_up,), grad)
    exact = with_gradients(unpacked("silu", True), doubled((gate_up,)), grad)
    assert_as_accurate(ours, exact, exact)
