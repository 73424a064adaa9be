"""The plain MLP, where it is a module of its own.

   fc1 = self.mlp.fc1(h); gelu = F.gelu(fc1); fc2 = self.mlp.fc2(gelu)
->
   mlp = LigerMLP(64 -> 96, activation=gelu)(h)
"""

from __future__ import annotations

from liger_fx.engine.activations import activated
from liger_fx.engine.layers import MLP_NAMES, check_no_casts, layer_paths, own_layers
from liger_fx.engine.match import Match
from liger_fx.engine.operators import linear
from liger_fx.engine.pattern import Constant, Op, Tensor, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.modules import LigerMLP

x, y = Tensor("x"), Tensor("y")
inner = activated(linear(y))


class PlainMLP(Rule):
    """fc2(act(fc1(x))) in a module of its own."""

    name = "plain_mlp"
    pattern = linear(activated(linear(x, Constant("fc1 layer"))), Constant("fc2 layer"))
    looks_like = linear(either(inner, Op("dropout", (inner,))))
    class_names = MLP_NAMES

    def check(self, match: Match) -> None:
        """Both layers are children of one module, and nothing is cast between them."""
        check_no_casts(match)
        paths = layer_paths(match)
        first, second = (paths[role].rpartition(".")[0] for role in ("fc1", "fc2"))
        if first != second:
            raise Reject(
                f"the two linear layers sit in different modules, {first} and {second}", match.root
            )

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is None:
            return None
        children, roles = own_layers(match, owner)
        module = LigerMLP(children, activation=match["activation"], **roles)
        return Replacement(module, (match["x"],), self.name)
