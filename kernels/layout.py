"""Tensors as rows in memory, so that kernels read strided views without a copy.

x of shape (2, 8, 5, 64), a transpose of a contiguous (2, 5, 8, 64)
    ->  80 rows of 64, the row index running over batch, sequence, head: memory order
"""

from typing import NamedTuple

import torch

Tensors = tuple[torch.Tensor, ...]


class Rows(NamedTuple):
    """Tensors of one shape as the same `total` rows: row r of each begins at
    (r // inner) * outer_strides[i] + (r % inner) * strides[i]. With one level inner is total.

    The strides are those of the inputs, then of the outputs.
    """

    total: int
    inner: int
    inputs: Tensors
    strides: tuple[int, ...]
    outer_strides: tuple[int, ...]


def empty_rows_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised dense tensor in x's order of dimensions in memory, last stride 1."""
    out = torch.empty_like(x, dtype=dtype)
    if out.stride(-1) != 1:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return out


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` if its last stride is 1, else a dense copy in its order of dimensions."""
    return x if x.stride(-1) == 1 else empty_rows_like(x).copy_(x)


def laid_out(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`value`, which an operation has just made, in the strides of `empty_rows_like(x)`, copied if
    need be.

    PyTorch's own operations choose strides by all their operands; a fake cannot foresee that.
    """
    strides = value.stride()
    if strides == x.stride() and strides[-1] == 1:  # what was just made leaves nothing out
        return value
    return in_strides_of(empty_rows_like(x, value.dtype), value)


def in_strides_of(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` if it has the strides of `like`, an uninitialised tensor; else `like`, filled."""
    return value if value.stride() == like.stride() else like.copy_(value)


def as_wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in that dtype. (Asking first takes a fifth of the time of a `.to` without effect.)"""
    return x if x.dtype is dtype else x.to(dtype)


def as_rows(inputs: Tensors, outputs: Tensors, levels: int) -> Rows:
    """Tensors of one shape, not empty, as rows in the memory order of outputs[0], described by at
    most `levels` (1 or 2) strides each. Inputs that cannot be are copied.

    The outputs lie in one order, their last stride is 1, and one stride describes each.
    """
    width = outputs[0].shape[-1]
    total = outputs[0].numel() // width
    if all(t.is_contiguous() for t in inputs + outputs):
        strides = (width,) * len(inputs + outputs)
        return Rows(total, total, inputs, strides, strides)
    sizes, strides_of = _merged(inputs, outputs)
    if len(sizes) > levels or (width > 1 and any(t.stride(-1) != 1 for t in inputs)):
        inputs = tuple(torch.empty_like(outputs[0], dtype=t.dtype).copy_(t) for t in inputs)
        sizes, strides_of = _merged(inputs, outputs)
    if not sizes:
        sizes, strides_of = [1], [(width,) * len(inputs + outputs)]
    return Rows(total, sizes[-1], inputs, strides_of[-1], strides_of[0])


def _merged(inputs: Tensors, outputs: Tensors) -> tuple[list[int], list[tuple[int, ...]]]:
    """The sizes of the dimensions before the last in the memory order of outputs[0], neighbours
    merged where every tensor allows it, and for each of them the stride of every tensor.
    """
    first = outputs[0]
    dims = [d for d in range(first.dim() - 1) if first.shape[d] != 1]
    dims.sort(key=first.stride, reverse=True)
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []
    for d in dims:
        size, steps = first.shape[d], tuple(t.stride(d) for t in inputs + outputs)
        if sizes and strides[-1] == tuple(size * step for step in steps):
            sizes[-1] *= size
            strides[-1] = steps
        else:
            sizes.append(size)
            strides.append(steps)
    return sizes, strides
