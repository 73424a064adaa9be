"""RMSNorm, in every spelling and wherever the weight, the offset and the casts stand.

    to = h.to(float32); pow_1 = to.pow(2); mean = pow_1.mean(-1, keepdim=True); add = mean + 1e-06
    rsqrt = torch.rsqrt(add); mul = to * rsqrt; to_1 = mul.to(bfloat16); mul_1 = weight * to_1
 ->
    input_layernorm = LigerRMSNorm((64,), eps=1e-06)(h)

Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019: x / sqrt(mean(x^2) + eps) * weight.
Gemma multiplies by 1 + weight, Llama 4's query norm by nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.engine.dtypes import check_comes_back, rounding
from liger_fx.engine.match import Match
from liger_fx.engine.operators import mean, rsqrt, sqrt, square
from liger_fx.engine.parameters import leaf_parameters, own_parameter
from liger_fx.engine.pattern import Constant, Op, Pattern, Tensor, anything, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term
from liger_fx.modules import LigerRMSNorm
from liger_fx.modules.casting import Cast

weight, eps, offset = Tensor("weight"), Constant("eps"), Constant("offset")
summed = either(Op("mean", (anything,)), Op("sum", (anything,)))


def root_of(x: Pattern) -> Pattern:
    """1 / its root mean square."""
    return rsqrt(either(mean(square(x)) + eps, mean(square(x))))


def norm_of(x: Pattern) -> Pattern:
    """Every form of the norm of x."""
    return either(
        x * root_of(x) * either(offset + weight, weight),
        x * root_of(x),
        Op("rms_norm", (x, weight), {"eps": eps}),
        Op("rms_norm", (x,), {"eps": eps, "module": Constant("leaf")}),
    )


class RMSNorm(Rule):
    """In the place of a norm module, or beside the code that spells one out."""

    name = "rms_norm"
    pattern = norm_of(Tensor("x"))
    looks_like = either(
        rsqrt(anything),
        sqrt(either(summed + anything, summed)),
        Op("rms_norm", (anything,)),
        Op("rms_norm", (anything, anything)),
    )
    class_names = r"RMS_?Norm|L2Norm|T5LayerNorm"

    def check(self, match: Match) -> Cast:
        """Whether the result has the input's dtype, or that of input times weight."""
        check_norm(match, match["x"])
        return rounding(match, match.view(match.root), "x", "weight")

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is None and match.get("leaf") is not None:
            return None  # its weight is no node of the graph that could be handed over
        options = options_of(match, match["x"], owner)
        inputs: tuple[Term, ...] = (match["x"],)
        if owner is None and "weight" in match:
            inputs += (match["weight"],)
        return Replacement(LigerRMSNorm(**options), inputs, self.name)


def check_norm(match: Match, x: Term) -> None:
    """Reject what is no RMSNorm of x, or one of no fixed width."""
    width = x.width
    if width is None:
        raise Reject("the width of its rows is not fixed", match.root)
    if "weight" in match and match.spec("weight").shape != (width,):
        shape = tuple(match.spec("weight").shape)
        raise Reject(f"the weight has shape {shape}, not ({width},)", match["weight"].node)
    if x.op != "sub" or x.operands[1].op != "mean":
        return
    if match.view.same(x.operands[0], x.operands[1].operands[0]):
        raise Reject("it subtracts the mean first: a LayerNorm, not an RMSNorm", x.node)


def options_of(match: Match, x: Term, owner: Owner | None) -> dict[str, Any]:
    """What the named module is made with; the rule's check has found its cast."""
    options: dict[str, Any] = {"width": x.width, "eps": match.get("eps", 0.0)}
    options |= {"offset": float(match.get("offset", 0.0)), "cast": match.found}
    if owner is not None:
        check_comes_back(match, x)
        if match.get("leaf") is not None:
            options |= leaf_parameters(match, owner, nn.RMSNorm, "weight")
        else:
            options |= own_parameter(match, owner, "weight")
    return options
