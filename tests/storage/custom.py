"""Small modules that are no transformers models."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TABLE = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Norm(nn.Module):
    """RMSNorm by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    """A norm between two linear layers, with a scale that only an attribute tells."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.first, self.norm, self.second = nn.Linear(8, 8), Norm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x))) * self.scale


class UsesConstants(nn.Module):
    """Reads a tensor that no module holds, and one that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * TABLE + self.steps


class AsksItsWeight(nn.Module):
    """Asks how its weight lies in memory, and of which class it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16).view(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.weight.stride()[0] if type(self.weight) is nn.Parameter else 7
        return x @ self.weight * factor


@dataclass
class Settings:
    """A config of one's own."""

    scale: float = 1.0


class Slots:
    """The same without a __dict__."""

    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Plain:
    """A scale that a list decides, found by a method."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    @property
    def scale(self) -> float:
        return sum(self.values)


class Opaque(deque[float]):
    """Holds what no field tells."""

    def __init__(self, scale: float) -> None:
        super().__init__([scale])

    @property
    def scale(self) -> float:
        return self[0]


class Held(nn.Module):
    """Scales by what an object says."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.settings.scale


class Applies(nn.Module):
    """Applies a function that it was given."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)
