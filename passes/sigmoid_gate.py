"""A product with a sigmoid for a gate: of attention's result, or any other.

    sigmoid = torch.sigmoid(gate); mul = attention * sigmoid
 ->
    sigmoid_gate = LigerSigmoidGate(64)(gate, attention)

Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2017. What is part of an MLP
(silu is x * sigmoid(x)) the rules before this one have taken.
"""

from __future__ import annotations

from liger_fx.engine.activations import sigmoid
from liger_fx.engine.layers import check_no_casts
from liger_fx.engine.match import Match
from liger_fx.engine.pattern import Tensor, anything
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.modules import LigerSigmoidGate

gate, x = Tensor("gate"), Tensor("x")


class SigmoidGate(Rule):
    """x * sigmoid(gate), of one shape and dtype."""

    name = "sigmoid_gate"
    pattern = x * sigmoid(gate)
    looks_like = anything * sigmoid(gate)

    def check(self, match: Match) -> None:
        """Gate, what it is multiplied with and the product are alike."""
        check_no_casts(match)
        specs = [match.spec("gate"), match.spec("x"), match.root_spec]
        if len(set(specs)) > 1:
            raise Reject(
                f"gate, input and product are not alike: {', '.join(map(str, specs))}", match.root
            )

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        module = LigerSigmoidGate(width=match.view(match.root).width)
        return Replacement(module, (match["gate"], match["x"]), self.name)
