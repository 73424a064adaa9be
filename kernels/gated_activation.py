"""The middle of a gated MLP: the activation of one half times the other half.

    silu(gate(x)) * up(x)                          ->  gated_activation(gate(x), up(x), "silu")
    gate, up = gate_up(x).chunk(2, dim=-1); ...    ->  packed_gated_activation(gate_up(x), "silu")

Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU (silu), GEGLU (gelu), ReGLU (relu).
With f the activation, dgate = dy * up * f'(gate) and dup = dy * f(gate): the backward computes f
again from gate, so that nothing but gate and up is kept.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from liger_fx.kernels.activation import (
    activate,
    activate_and_slope,
    activation_slope,
    apply_activation,
    check_activation,
)
from liger_fx.kernels.launch import (
    Launch,
    ceil_div,
    compute_dtype,
    launch,
    power_of_two,
    uses_triton,
)
from liger_fx.kernels.layout import Tensors, as_rows, as_wide, empty_rows_like, laid_out
from liger_fx.kernels.library import (
    Compute,
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.replay import Replayed


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, in float32 and rounded once.

    gate, up: one shape (..., width), any strides; activation: one of ACTIVATIONS. Returns that
    shape, in the dtype that gate * up has, in gate's order of dimensions in memory.
    Float64 is computed in float64. ValueError for an unknown activation or unlike shapes; a second
    derivative raises RuntimeError.
    """
    check_activation(activation)
    if gate.shape != up.shape:
        raise ValueError(
            f"gated_activation: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape"
        )
    return _gated(gate, up, activation)


def packed_gated_activation(
    gate_up: torch.Tensor, activation: str, gate_first: bool = True
) -> torch.Tensor:
    """`gated_activation` of the two halves of the last dimension, which are not copied.

    gate_up: (..., 2 * width), gate before up unless `gate_first` is False. Returns (..., width).
    The gradient is written packed, too. ValueError for an odd last dimension, else as above.
    """
    check_activation(activation)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"packed_gated_activation: {gate_up.shape[-1]} does not split in halves")
    return _packed(gate_up, activation, gate_first)


def gated_activation_reference(
    gate: torch.Tensor, up: torch.Tensor, activation: str
) -> torch.Tensor:
    """What `gated_activation` computes, in PyTorch's own operations."""
    dtype = compute_dtype(gate, up)
    y = apply_activation(as_wide(gate, dtype), activation) * as_wide(up, dtype)
    return as_wide(y, gate.dtype if gate.dtype is up.dtype else torch.result_type(gate, up))


def packed_gated_activation_reference(
    gate_up: torch.Tensor, activation: str, gate_first: bool = True
) -> torch.Tensor:
    """What `packed_gated_activation` computes, in PyTorch's own operations."""
    return gated_activation_reference(*halves(gate_up, gate_first), activation)


def gated_activation_backward_reference(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up by the formulas above, in PyTorch's own operations."""
    dtype = compute_dtype(gate, up)
    wide, grad = gate.to(dtype), dy.to(dtype)
    dgate = grad * up.to(dtype) * activation_slope(wide, activation)
    return dgate.to(gate.dtype), (grad * apply_activation(wide, activation)).to(up.dtype)


def halves(gate_up: torch.Tensor, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of gate and up, which one tensor holds beside each other."""
    first, second = gate_up.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


@triton.jit
def _tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The row and column numbers of this program's tile (64-bit), and which of them exist."""
    blocks = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    return row[:, None], col[None, :], (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, rows, cols, gate_stride, up_stride, y_stride,
    NAME: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(rows, cols, ROWS, COLS)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(tl.float32)
    y = activate(gate, NAME) * up
    tl.store(y_ptr + row * y_stride + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, cols,
    dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    NAME: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    row, col, mask = _tile(rows, cols, ROWS, COLS)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask, other=0.0).to(tl.float32)
    y, slope = activate_and_slope(gate, NAME)
    dgate = (dy * up * slope).to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row * dgate_stride + col, dgate, mask)
    tl.store(dup_ptr + row * dup_stride + col, (dy * y).to(dup_ptr.dtype.element_ty), mask)
    if AGAIN:  # the product itself, in the place of its gradient
        tl.store(dy_ptr + row * dy_stride + col, (y * up).to(dy_ptr.dtype.element_ty), mask)


@lru_cache
def gated_launch(cols: int) -> Launch:
    """Tiles of 2048 elements, 16 to a thread."""
    cols = min(power_of_two(cols), 2048)
    return Launch(2048 // cols, cols, warps=4)


def _launch(kernel: Any, name: str, inputs: Tensors, outputs: Tensors, **constants: bool) -> None:
    """Run `kernel` over tensors of one shape: as one long row where all are contiguous."""
    if not outputs[0].numel():
        return
    rows, _, inputs, strides, _ = as_rows(inputs, outputs, levels=1)
    cols = outputs[0].shape[-1]
    if all(t.is_contiguous() for t in inputs + outputs):
        rows, cols = 1, outputs[0].numel()
    tile = gated_launch(cols)
    programs = ceil_div(rows, tile.rows) * ceil_div(cols, tile.cols)
    launch(
        kernel, programs, outputs[0].device, *inputs, *outputs, rows, cols, *strides,
        NAME=name, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps, **constants,
    )  # fmt: skip


def gradients_and_product(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grads: Tensors,
    activation: str,
    *,
    again: bool,
) -> None:
    """Fill `grads` with the gradients of gate and up; `again`, fill `dy` with the product whose
    gradient it was. All contiguous, or halves of what is."""
    if uses_triton(dy, gate, up):
        _launch(_backward_kernel, activation, (dy, gate, up), grads, AGAIN=again)
        return
    found = gated_activation_backward_reference(dy, gate, up, activation)
    for grad, value in zip(grads, found, strict=True):
        grad.copy_(value)
    if again:
        dy.copy_(gated_activation_reference(gate, up, activation))


def product_of(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, without a derivative."""
    if not uses_triton(gate, up):
        return _by_pytorch(gate, up, activation)
    y = _fake(gate, up, activation)
    _launch(_forward_kernel, activation, (gate, up), (y,))
    return y


def _by_pytorch(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return laid_out(gated_activation_reference(gate, up, activation), gate)


def _backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if not uses_triton(dy, gate, up):
        plain = gated_activation_backward_reference(dy, gate, up, activation)
        return laid_out(plain[0], gate), laid_out(plain[1], gate)
    grads = _backward_fake(dy, gate, up, activation)
    _launch(_backward_kernel, activation, (dy, gate, up), grads)
    return grads


def _packed_forward(gate_up: torch.Tensor, activation: str, gate_first: bool) -> torch.Tensor:
    return product_of(*halves(gate_up, gate_first), activation)


def _packed_backward(
    dy: torch.Tensor, gate_up: torch.Tensor, activation: str, gate_first: bool
) -> torch.Tensor:
    gate, up = halves(gate_up, gate_first)
    grad = empty_rows_like(gate_up)
    grads = halves(grad, gate_first)
    if uses_triton(dy, gate_up):
        _launch(_backward_kernel, activation, (dy, gate, up), grads)
        return grad
    for half, value in zip(
        grads, gated_activation_backward_reference(dy, gate, up, activation), strict=True
    ):
        half.copy_(value)
    return grad


def _fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return empty_rows_like(gate, torch.result_type(gate, up))


def _backward_fake(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = empty_rows_like(gate)
    return dgate, torch.empty_like(dgate, dtype=up.dtype)


def _packed_fake(gate_up: torch.Tensor, activation: str, gate_first: bool) -> torch.Tensor:
    return empty_rows_like(halves(gate_up, gate_first)[0])


_gated = define_op(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor",
    Replayed(product_of, _by_pytorch),
    _fake,
)
_gated_backward = define_op(
    "gated_activation_backward(Tensor dy, Tensor gate, Tensor up, str activation)"
    " -> (Tensor, Tensor)",
    Replayed(_backward),
    _backward_fake,
)
_packed = define_op(
    "packed_gated_activation(Tensor gate_up, str activation, bool gate_first) -> Tensor",
    Replayed(_packed_forward),
    _packed_fake,
)
_packed_backward_op = define_op(
    "packed_gated_activation_backward(Tensor dy, Tensor gate_up, str activation, bool gate_first)"
    " -> Tensor",
    Replayed(_packed_backward),
    lambda dy, gate_up, activation, gate_first: empty_rows_like(gate_up),
)


def _again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated_activation_reference(gate, up, ctx.activation)

    return *gradients_of(plain, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:2]), None, None


def _packed_again(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def plain(gate_up: torch.Tensor) -> torch.Tensor:
        return packed_gated_activation_reference(gate_up, *ctx.constants)

    grads = gradients_of(plain, ctx.saved_tensors, (dy,), ctx.needs_input_grad[:1])
    return *grads, None, None, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str, compute: Compute
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return compute(gate, up, activation)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gated_backward(dy, *ctx.saved_tensors, ctx.activation), None, None


class _PackedGatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: torch.Tensor, activation: str, gate_first: bool, compute: Compute
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.constants = activation, gate_first
        return compute(gate_up, activation, gate_first)

    @staticmethod
    @differentiable(_packed_again)
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _packed_backward_op(dy, *ctx.saved_tensors, *ctx.constants), None, None, None


differentiate(_gated, _GatedActivation, gated_activation_reference)
differentiate(_packed, _PackedGatedActivation, packed_gated_activation_reference)
