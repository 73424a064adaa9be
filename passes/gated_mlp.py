"""The gated MLP: whole where it is a module of its own, else its activation and product.

    gate_proj = self.mlp.gate_proj(h); silu = F.silu(gate_proj); up_proj = self.mlp.up_proj(h)
    mul = silu * up_proj; down_proj = self.mlp.down_proj(mul)
 ->
    mlp = LigerSwiGLUMLP(64 -> 96, activation=silu)(h)

    chunk = h.chunk(2, -1); mul = F.gelu(chunk[0]) * chunk[1]
 ->
    geglu = LigerGEGLU(96, activation=gelu)(h)

Shazeer, "GLU Variants Improve Transformer", 2020: down(act(gate(x)) * up(x)). One linear layer may
compute gate and up as the two halves of its result.
"""

from __future__ import annotations

from liger_fx.engine.activations import activated
from liger_fx.engine.layers import MLP_NAMES, check_no_casts, layer_results, own_layers
from liger_fx.engine.match import Match
from liger_fx.engine.operators import linear, lower, upper
from liger_fx.engine.pattern import Constant, Pattern, Tensor, anything, choice, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.modules import (
    LigerGEGLU,
    LigerGEGLUMLP,
    LigerReGLU,
    LigerReGLUMLP,
    LigerSwiGLU,
    LigerSwiGLUMLP,
)

MLPS = {name: c for c in (LigerSwiGLUMLP, LigerGEGLUMLP, LigerReGLUMLP) for name in c.activations}
PRODUCTS = {name: c for c in (LigerSwiGLU, LigerGEGLU, LigerReGLU) for name in c.activations}

x, packed, gate, up = Tensor("x"), Tensor("packed"), Tensor("gate"), Tensor("up")


def product(gate: Pattern, up: Pattern) -> Pattern:
    """act(gate) * up"""
    return activated(gate) * up


def halves(both: Pattern) -> Pattern:
    """gate and up in one tensor, either of them first"""
    first, second = lower(both), upper(both)
    return choice("gate_first", {True: product(first, second), False: product(second, first)})


separate = product(linear(x, Constant("gate layer")), linear(x, Constant("up layer")))
together = halves(linear(x, Constant("gate_up layer")))
whole = linear(either(separate, together), Constant("down layer"))


class GatedMLP(Rule):
    """down(act(gate(x)) * up(x)) in a module of its own, act(gate) * up anywhere."""

    name = "gated_mlp"
    pattern = either(whole, halves(packed), product(gate, up))
    looks_like = product(gate, anything)
    class_names = MLP_NAMES

    def check(self, match: Match) -> None:
        """Inside, everything has one dtype; gate, up and their product have one shape."""
        check_no_casts(match)
        if "down layer" in match:
            given = layer_results(match)
            specs = [given[role] for role in ("gate", "up") if role in given]
        else:
            names = [name for name in ("gate", "up") if name in match]
            specs = [match.spec(name) for name in names] + [match.root_spec] * bool(names)
        if len(set(specs)) > 1:
            raise Reject(
                f"gate, up and product are not alike: {', '.join(map(str, specs))}", match.root
            )

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        activation, gate_first = match["activation"], match.get("gate_first", True)
        if "down layer" not in match:
            inputs = (match["packed"],) if "packed" in match else (match["gate"], match["up"])
            width = match.view(match.root).width
            part = PRODUCTS[activation](activation, gate_first=gate_first, width=width)
            return Replacement(part, inputs, type(part).__name__.removeprefix("Liger").lower())
        if owner is None:
            return None
        children, roles = own_layers(match, owner)
        if "gate_up" in roles:
            roles["gate_first"] = gate_first
        module = MLPS[activation](children, activation=activation, **roles)
        return Replacement(module, (match["x"],), self.name)
