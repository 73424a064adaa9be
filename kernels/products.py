"""Products of matrices as operators here need them: into memory that is there, summed in float32,
and of groups of rows, each with a matrix of its own.

All matrices have two dimensions; the sums of a product are float32's whatever its factors are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F

# For products of few rows cuBLAS may add parts of a sum in the result's own dtype, which PyTorch
# allows (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction).
FEW_ROWS = 16


def linear_into(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """y = x weight^T + bias."""
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """y += a b, rounded once."""
    if y.is_cuda and y.shape[0] < FEW_ROWS and y.element_size() == 2:
        y.add_(wide_product(a, b))
    else:
        y.addmm_(a, b)


def grouped_product(
    rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Each group of rows times its matrix.

    rows: (n, a), sorted by group; matrices: (groups, a, b), or a transpose of contiguous ones;
    offsets: (groups,) int32, where each group ends. Returns (n, b), contiguous.
    """
    if _in_one_launch(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=offsets)
    result = rows.new_empty((rows.shape[0], matrices.shape[2]))
    for group, part in _parts(offsets):
        torch.mm(rows[part], matrices[group], out=result[part])
    return result


def grouped_outer(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a^T b of each group of rows; zero where a group has none.

    a: (n, p), b: (n, q), contiguous; offsets as above. Returns (groups, p, q), contiguous.
    """
    if _in_one_launch(a, b):
        return F.grouped_mm(a.t(), b, offs=offsets)
    result = a.new_zeros((offsets.shape[0], a.shape[1], b.shape[1]))
    for group, part in _parts(offsets):
        torch.mm(a[part].t(), b[part], out=result[group])
    return result


def _parts(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and these."""
    for group, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if start < end:
            yield group, slice(start, end)


def _in_one_launch(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether PyTorch's grouped_mm serves these: no float64, and rows that begin at multiples of 16
    bytes. (On the CPU it multiplies group by group as well.)"""
    if not a.is_cuda or a.dtype is torch.float64 or not a.shape[0]:
        return False
    sizes = (*a.shape[1:], *b.shape[1:])
    return all(n * a.element_size() % 16 == 0 for n in sizes) and _is_new_enough(a.get_device())


@lru_cache
def _is_new_enough(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
