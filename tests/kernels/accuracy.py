"""How close a kernel's result must be to float64: as close as the eager spelling, or closer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from liger_fx.kernels.launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two units in the last place, for sums in another order and a GPU's exp. The interpreter has numpy
# add the numbers of a row one after the other, where a GPU adds them in a tree.
FLOAT32_SLACK = 1e-6 if INTERPRETED else 2.4e-7


Draw = Callable[..., torch.Tensor]


def drawing(dtype: torch.dtype) -> Draw:
    """draw(*shape): a contiguous random tensor on DEVICE. Strided views are taken of it afterwards,
    since a cast or a move would make them dense.
    """
    return lambda *shape: torch.randn(shape, device=DEVICE).to(dtype)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact||, in float64; infinite where value has a NaN."""
    error = torch.linalg.vector_norm(value.double() - exact)
    ratio = error / torch.linalg.vector_norm(exact) if exact.any() else error
    return float("inf") if ratio.isnan() else ratio.item()


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact` as the best kernel could store it. The interpreter cuts bfloat16 off instead of
    rounding it, so there the best is the number cut off.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        bits = exact.float().contiguous().view(torch.int32) & -65536
        return bits.view(torch.float32).to(dtype)
    return exact.to(dtype)


def error_over_limit(value: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of `value` over what it may be. In float32: 1.1 times that of `eager`, the plain
    spelling in the same dtype. In the halves: 1.1 times that of one rounding, which is less.
    """
    limit = relative_error(rounded(exact, value.dtype), exact)
    if value.dtype == torch.float32:
        limit = max(limit, relative_error(eager, exact))
    return relative_error(value, exact) / (1.1 * limit + FLOAT32_SLACK)


def assert_as_accurate(
    values: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """All `error_over_limit` of outputs and gradients at most 1."""
    for value, plain, true in zip(values, eager, exact, strict=True):
        assert value.shape == true.shape
        assert error_over_limit(value, plain, true) <= 1


def with_gradients(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], *grads: torch.Tensor
) -> list[torch.Tensor]:
    """The outputs of function(*inputs), then the gradients of `inputs` for those of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, given)]


def doubled(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double() for t in tensors]


def far_apart(folder: Path, rows: int, width: int) -> torch.Tensor:
    """A float32 (rows, width) whose third row lies beyond 2^31 elements, in a sparse file.

    The stride itself fits in 32 bits: Triton would take a larger one as 64-bit by itself.
    """
    stride = 2**30 + 64
    memory = torch.from_file(
        str(folder / "sparse"), shared=True, size=(rows - 1) * stride + width, dtype=torch.float32
    )
    x = memory.as_strided((rows, width), (stride, 1))
    return x.copy_(torch.randn(rows, width))
