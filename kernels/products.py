"""Products of matrices as operators here need them: into memory that is there, summed in float32.

All matrices have two dimensions; the sums of a product are float32's whatever its factors are.
"""

from __future__ import annotations

import torch

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
