"""Small modules with the habits of real modelling code that a tracer must get right."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class InPlace(nn.Module):
    """Writes into a tensor whose earlier view is read afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        head = y[:, :1]
        y.add_(1)
        y[:, 1:] *= 3
        return head + y


class NoGradRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            frozen = x * self.scale
        return frozen + x * self.scale


class AutocastRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.linear(x)
        return low.float() + self.linear(x)


class ReadsLength(nn.Module):
    """Branches on a size: a graph serves one side of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 8:
            return x * 2
        return x + 1


class Selects(nn.Module):
    """Depends on data: how many elements are positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = x[x > 0]
        return x + (picked.sum() if picked.numel() > 3 else 0)


class HoldsSelects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.select = Selects()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.select(self.before(x)) * 2


class StoresState(nn.Module):
    """Keeps a tensor on itself while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.positions = self.positions.to(x.dtype)
        self.last: Any = x * self.positions
        return self.last


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no such luck")


class UsesConstant(nn.Module):
    """Reads a tensor that no module registers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * TABLE


TABLE = torch.tensor([1.0, 2.0, 3.0, 4.0])
