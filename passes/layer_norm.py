"""LayerNorm, in every spelling and wherever the weight, the bias and the casts stand.

    to = h.to(float32); mean = to.mean(-1, keepdim=True); sub = to - mean; pow_1 = sub.pow(2)
    mean_1 = pow_1.mean(-1, keepdim=True); add = mean_1 + 1e-05; rsqrt = torch.rsqrt(add)
    mul = sub * rsqrt; mul_1 = weight.to(float32) * mul; to_1 = mul_1.to(bfloat16)
 ->
    input_layernorm = LigerLayerNorm((64,), eps=1e-05, weight)(h)

Ba, Kiros & Hinton, "Layer Normalization", 2016: (x - mean) / sqrt(variance + eps) * weight + bias.
Nemotron multiplies by 1 + weight, Cohere adds nothing, OLMo does neither.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.engine.dtypes import check_comes_back, rounding
from liger_fx.engine.match import Match
from liger_fx.engine.operators import mean, rsqrt, sqrt, square, variance
from liger_fx.engine.parameters import leaf_parameters, own_parameter
from liger_fx.engine.pattern import Constant, Number, Op, Pattern, Tensor, anything, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term
from liger_fx.modules import LigerLayerNorm
from liger_fx.modules.casting import Cast

FACTORS = ("weight", "bias")
weight, eps, offset = Tensor("weight"), Constant("eps"), Constant("offset")
bias = Tensor("bias", rank=1)  # else a residual that is added to the norm would be one
scale = either(offset + weight, weight)
of_torch = {"eps": eps, "rank": Constant("rank")}


def root_of(x: Pattern) -> Pattern:
    """1 / its standard deviation."""
    return rsqrt(either(variance(x) + eps, variance(x)))


def norm_of(x: Pattern) -> Pattern:
    """Every form of the norm of x."""
    plain = (x - mean(x)) * root_of(x)
    one, zero = Number(1), Number(0)
    bare = Op("layer_norm", (x, one, zero), of_torch)
    return either(
        plain * scale + bias,
        plain * scale,
        plain,
        bare * scale + bias,
        bare * scale,
        Op("layer_norm", (x, scale, either(bias, zero)), of_torch),
        bare,
        Op("layer_norm", (x,), {**of_torch, "module": Constant("leaf")}),
    )


spread = either(Op("mean", (square(anything - Op("mean", (anything,))),)), Op("var", (anything,)))
under_root = either(spread + anything, spread)


class LayerNorm(Rule):
    """In the place of a norm module, or beside the code that spells one out."""

    name = "layer_norm"
    pattern = norm_of(Tensor("x"))
    looks_like = either(
        rsqrt(under_root),
        sqrt(under_root),
        Op("layer_norm", (anything,)),
        Op("layer_norm", (anything, anything, anything)),
    )
    class_names = r"LayerNorm(\d?\w)?$"

    def check(self, match: Match) -> Cast:
        """What dtype the result has."""
        check_norm(match, match["x"])
        return dtype_of_norm(match, match["x"], "x")

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is None and match.get("leaf") is not None:
            return None  # its weight is no node of the graph that could be handed over
        module = LigerLayerNorm(**options_of(match, match["x"], owner))
        given = () if owner is not None else factors_of(match)
        return Replacement(module, (match["x"], *given), self.name)


def check_norm(match: Match, x: Term) -> None:
    """Reject what is no norm of rows of a fixed width."""
    width = x.width
    if width is None:
        raise Reject("the width of its rows is not fixed", match.root)
    if match.get("rank", 1) != 1:
        raise Reject(f"it is the norm of the last {match['rank']} dimensions", match.root)
    for role in FACTORS:
        if role in match and match.spec(role).shape != (width,):
            shape = tuple(match.spec(role).shape)
            raise Reject(f"the {role} has shape {shape}, not ({width},)", match[role].node)


def dtype_of_norm(match: Match, x: Term, name: str) -> Cast:
    """How the result is rounded: as PyTorch's own norm does it, where that is called with x as it
    is and nothing is done to its result."""
    result = match.view(match.root)
    if result.op == "layer_norm":
        given = result.operands[0]
        while given.op == "alias":
            given = given.operands[0]
        if match.view.same(given, x):
            return "autocast"
    return rounding(match, result, name, *FACTORS)


def factors_of(match: Match) -> tuple[Term, ...]:
    """The weight and the bias as arguments of the named module."""
    return tuple(match[role] for role in FACTORS if role in match)


def options_of(match: Match, x: Term, owner: Owner | None) -> dict[str, Any]:
    """What the named module is made with; the rule's check has found its cast."""
    options: dict[str, Any] = {"width": x.width, "eps": float(match.get("eps", 0.0))}
    options |= {"offset": float(match.get("offset", 0.0)), "cast": match.found}
    if owner is None:
        return options
    if match.get("leaf") is not None:
        return options | leaf_parameters(match, owner, nn.LayerNorm, *FACTORS)
    check_comes_back(match, x)
    for role in FACTORS:
        options |= own_parameter(match, owner, role)
    return options
