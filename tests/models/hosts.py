"""Small models around one hand-written module, so that it stands where it would in a real one."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, HEAD = 24, 16


class Around(nn.Module):
    """project -> inner -> read: inner(x) with x (batch, length, WIDTH)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.project = nn.Linear(10, WIDTH)
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.project(x)).tanh()


class Attention(nn.Module):
    """Projects to four query and two key heads of HEAD and turns them; heads first, or last."""

    def __init__(self, inner: nn.Module, heads_first: bool) -> None:
        super().__init__()
        self.q = nn.Linear(10, 4 * HEAD)
        self.k = nn.Linear(10, 2 * HEAD)
        self.inner, self.heads_first = inner, heads_first

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, HEAD)
        k = self.k(x).view(batch, length, 2, HEAD)
        if self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return self.inner(q, k, cos, sin)
