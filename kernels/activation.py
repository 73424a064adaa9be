"""The activation of a plain MLP, and the activation functions that the gated one shares.

fc2(gelu(fc1(x)))  ->  fc2(activation(fc1(x), "gelu"))

silu          x * s(x), s(x) = 1 / (1 + exp(-x))           Elfwing et al., 2017
gelu          x * (1 + erf(x / sqrt(2))) / 2                Hendrycks & Gimpel, 2016
gelu_tanh     x * (1 + tanh(u)) / 2 = x * s(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
quick_gelu    x * s(1.702 x)                                the same, 2016
relu          max(x, 0), derivative 0 at 0
relu_squared  max(x, 0)^2                                   So et al., "Primer", 2021
sigmoid       s(x), as a gate: Dauphin et al., "Gated Convolutional Networks", 2017
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from liger_fx.kernels.launch import Launch, ceil_div, compute_dtype, launch, uses_triton
from liger_fx.kernels.layout import in_strides_of
from liger_fx.kernels.library import (
    Compute,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.replay import Replayed

_QUICK = 1.702

_BY_PYTORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(_QUICK * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}
ACTIVATIONS = tuple(_BY_PYTORCH)


def check_activation(name: str) -> None:
    """ValueError unless `name` is one of ACTIVATIONS."""
    if name not in _BY_PYTORCH:
        raise ValueError(f"unknown activation {name!r}: known are {', '.join(ACTIVATIONS)}")


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation called `name` (one of ACTIVATIONS) of each element, computed in float32.

    x: any shape and strides. Returns x's shape, dtype and order of dimensions in memory.
    Float64 is computed in float64. ValueError for an unknown name. Second derivatives go
    through `activation_reference`.
    """
    check_activation(name)
    return _activation(x, name)


def apply_activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """PyTorch's own activation of that name, in x's dtype."""
    return _BY_PYTORCH[name](x)


def activation_slope(x: torch.Tensor, name: str) -> torch.Tensor:
    """The derivative of the activation at x, in PyTorch's own operations and x's dtype."""
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    if name == "gelu":
        return torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    if name in ("silu", "quick_gelu"):
        scaled = x if name == "silu" else _QUICK * x
        s = torch.sigmoid(scaled)
        return s * (1 + scaled * (1 - s))
    if name == "sigmoid":
        s = torch.sigmoid(x)
        return s * (1 - s)
    return 2 * F.relu(x) if name == "relu_squared" else (x > 0).to(x.dtype)


def activation_reference(x: torch.Tensor, name: str) -> torch.Tensor:
    """What `activation` computes, in PyTorch's own operations."""
    return apply_activation(x.to(compute_dtype(x)), name).to(x.dtype)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of a float32 tile."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif NAME == "sigmoid":
        return tl.sigmoid(x)
    else:
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
        return y * y if NAME == "relu_squared" else y


@triton.jit
def activate_and_slope(x, NAME: tl.constexpr):
    """The activation of a float32 tile, and its derivative."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = tl.sigmoid(v)
        dv = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, s + x * s * tl.sigmoid(-v) * dv  # 1 - s would cancel
    elif NAME == "quick_gelu":
        v = 1.702 * x
        s = tl.sigmoid(v)
        return x * s, s * (1.0 + v * tl.sigmoid(-v))
    elif NAME == "sigmoid":
        s = tl.sigmoid(x)
        return s, s * tl.sigmoid(-x)
    elif NAME == "relu_squared":
        y = tl.where(x < 0.0, 0.0, x)
        return y * y, 2.0 * y
    else:
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def _forward_kernel(x_ptr, y_ptr, count, NAME: tl.constexpr, COLS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    x = tl.load(x_ptr + i, i < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, activate(x, NAME).to(y_ptr.dtype.element_ty), i < count)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, count, NAME: tl.constexpr, COLS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    x = tl.load(x_ptr + i, i < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, i < count, other=0.0).to(tl.float32)
    _, slope = activate_and_slope(x, NAME)
    tl.store(dx_ptr + i, (dy * slope).to(dx_ptr.dtype.element_ty), i < count)


def elementwise_launch() -> Launch:
    """16 elements to a thread."""
    return Launch(1, 2048, warps=4)


def _launch(kernel: Any, name: str, out: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Run `kernel` over all elements, `tensors` brought into the layout of `out` where need be."""
    if out.numel():
        same = [
            t if t.stride() == out.stride() else torch.empty_like(out, dtype=t.dtype).copy_(t)
            for t in tensors
        ]
        tile = elementwise_launch()
        programs = ceil_div(out.numel(), tile.cols)
        constants = {"NAME": name, "COLS": tile.cols, "num_warps": tile.warps}
        launch(kernel, programs, out.device, *same, out, out.numel(), **constants)
    return out


def _forward(x: torch.Tensor, name: str) -> torch.Tensor:
    y = torch.empty_like(x)
    if not uses_triton(x):
        return in_strides_of(y, activation_reference(x, name))
    return _launch(_forward_kernel, name, y, x)


def _backward(dy: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    dx = torch.empty_like(x)
    if not uses_triton(dy, x):
        dtype = compute_dtype(x)
        plain = dy.to(dtype) * activation_slope(x.to(dtype), name)
        return in_strides_of(dx, plain.to(x.dtype))
    return _launch(_backward_kernel, name, dx, dy, x)


_activation = define_op(
    "activation(Tensor x, str name) -> Tensor",
    Replayed(_forward),
    lambda x, name: torch.empty_like(x),
)
_activation_backward = define_op(
    "activation_backward(Tensor dy, Tensor x, str name) -> Tensor",
    Replayed(_backward),
    lambda dy, x, name: torch.empty_like(x),
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return activation_reference(x, ctx.name)

    return *gradients_of(plain, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:1]), None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, compute: Compute) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return compute(x, name)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _activation_backward(dy, *ctx.saved_tensors, ctx.name), None, None


differentiate(_activation, _Activation, activation_reference)
