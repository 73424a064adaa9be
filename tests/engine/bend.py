"""The smallest rule there is, for the tests of the engine: weight * tanh(x), or tanh(x) twice.

tanh = x.tanh(); mul = scale * tanh   ->   bent = Bent(8)(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_fx.engine.match import Match
from liger_fx.engine.pattern import Op, Tensor, anything
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule

x, weight = Tensor("x"), Tensor("weight")


class Bent(nn.Module):
    """weight * tanh(x), the weight its own or given."""

    def __init__(self, width: int, name: str = "weight", own: nn.Parameter | None = None) -> None:
        super().__init__()
        self.width, self.name = width, name
        self.register_parameter(name, own)

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return (getattr(self, self.name) if weight is None else weight) * x.tanh()

    def extra_repr(self) -> str:
        return str(self.width)


class BentPair(nn.Module):
    """Two tensors bent by one weight."""

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return weight * x.tanh(), weight * y.tanh()


class Bend(Rule):
    """Alone, or in the place of the module that computes it."""

    name = "bend"
    pattern = weight * Op("tanh", (x,))
    looks_like = Op("tanh", (anything,))
    class_names = "Bend"

    def check(self, match: Match) -> str:
        if match.spec("weight").shape != (match["x"].width,):
            raise Reject("the weight is no row", match["weight"].node)
        return "checked"

    def build(self, match: Match, owner: Owner | None) -> Replacement:
        assert match.found == "checked"
        if owner is None:
            return Replacement(Bent(match["x"].width), (match["x"], match["weight"]), "bent")
        name = owner.own_name(match["weight"].attributes.get("path"))
        module = Bent(match["x"].width, name, owner.module.get_parameter(name))
        return Replacement(module, (match["x"],), "bent")


class BendTogether(Bend):
    """Two of one weight in one node, where there is a place for it."""

    def build(self, match: Match, owner: Owner | None) -> Replacement:
        return super().build(match, None)

    def pair(self, first: Match, second: Match) -> Replacement | None:
        if first["weight"].attributes != second["weight"].attributes:
            return None
        return Replacement(BentPair(), (first["x"], second["x"], first["weight"]), "bent")


class BendOwnOnly(Bend):
    """Only in a module's place."""

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:  # type: ignore[override]
        return None if owner is None else super().build(match, owner)


class BendModule(nn.Module):
    """A module that is a bend and nothing else."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> Any:
        return x.tanh() * self.scale
