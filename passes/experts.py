"""The experts of a mixture, where transformers computes them by grouped_mm.

    experts = self.mlp.experts(h, index, weights)            (experts): MixtralExperts
 ->
    experts = self.mlp.experts(h, index, weights)            (experts): LigerExperts

The layer is no graph to look into: it is called, and which functions that runs is looked at instead
(liger_fx/engine/experts.py). One that the user has computed in another way, or whose class computes
something else, stays.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.engine.experts import activation_of, why_not_gated_and_grouped
from liger_fx.engine.match import Match
from liger_fx.engine.pattern import Constant, Op, Tensor, anything
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.modules import LigerExperts

_PARAMETERS = ("gate_up_proj", "down_proj")


class Experts(Rule):
    """In the place of the layer."""

    name = "experts"
    pattern = Op(
        "experts",
        (Tensor("x"), Tensor("index", integers=True), Tensor("weights")),
        {"module": Constant("layer")},
    )
    looks_like = Op("experts", (anything, anything, anything))
    class_names = r"(?i)Experts|Naive_?MoE"

    def check(self, match: Match) -> dict[str, Any]:
        """What the named module is made with."""
        module: Any = match.view.module(match["layer"])
        if reason := why_not_gated_and_grouped(module):
            raise Reject(reason, match.root)
        activation = activation_of(module)
        if activation is None:
            raise Reject(f"its activation is {type(module.act_fn).__name__}", match.root)
        if not all(type(p) is nn.Parameter and p.is_floating_point() for p in module.parameters()):
            raise Reject("its weights are no plain tensors of floating-point numbers", match.root)
        x, index, weights = (match.spec(name) for name in ("x", "index", "weights"))
        if len(x.shape) != 2 or len(index.shape) != 2 or weights.shape != index.shape:
            raise Reject(f"it is called with {x}, {index} and {weights}", match.root)
        if not (x.dtype.is_floating_point and weights.dtype.is_floating_point):
            raise Reject(f"it is called with {x} and {weights}", match.root)
        parameters = {name: getattr(module, name) for name in _PARAMETERS}
        return {**parameters, "activation": activation, "transposed": module.is_transposed}

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is None:
            return None
        try:
            module = LigerExperts(**match.found)
        except ValueError as error:
            raise Reject(str(error), match.root) from None
        return Replacement(module, (match["x"], match["index"], match["weights"]), self.name)
