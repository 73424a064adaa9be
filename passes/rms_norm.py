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

from liger_fx.engine.dtypes import rounding
from liger_fx.engine.match import Match
from liger_fx.engine.operators import mean, rsqrt, sqrt, square
from liger_fx.engine.pattern import Constant, Op, Tensor, anything, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term, same
from liger_fx.modules import LigerRMSNorm
from liger_fx.modules.casting import Cast

x, weight, eps, offset = Tensor("x"), Tensor("weight"), Constant("eps"), Constant("offset")
root = rsqrt(either(mean(square(x)) + eps, mean(square(x))))
summed = either(Op("mean", (anything,)), Op("sum", (anything,)))


class RMSNorm(Rule):
    """In the place of a norm module, or beside the code that spells one out."""

    name = "rms_norm"
    pattern = either(
        x * root * either(offset + weight, weight),
        x * root,
        Op("rms_norm", (x, weight), {"eps": eps}),
        Op("rms_norm", (x,), {"eps": eps, "module": Constant("leaf")}),
    )
    looks_like = either(
        rsqrt(anything),
        sqrt(either(summed + anything, summed)),
        Op("rms_norm", (anything,)),
        Op("rms_norm", (anything, anything)),
    )
    class_names = r"RMS_?Norm|L2Norm|T5LayerNorm"

    def check(self, match: Match) -> Cast:
        """Whether the result has the input's dtype, or that of input times weight."""
        width = match["x"].width
        if width is None:
            raise Reject("the width of its rows is not fixed", match.root)
        if "weight" in match and match.spec("weight").shape != (width,):
            shape = tuple(match.spec("weight").shape)
            raise Reject(f"the weight has shape {shape}, not ({width},)", match["weight"].node)
        self._check_not_layer_norm(match)
        return rounding(match, match.view(match.root), "x", "weight")

    @staticmethod
    def _check_not_layer_norm(match: Match) -> None:
        term: Term = match["x"]
        if term.op != "sub" or term.operands[1].op != "mean":
            return
        if same(term.operands[0], term.operands[1].operands[0]):
            raise Reject("it subtracts the mean first: a LayerNorm, not an RMSNorm", term.node)

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is None and match.get("leaf") is not None:
            return None  # its weight is no node of the graph that could be handed over
        options: dict[str, Any] = {"offset": float(match.get("offset", 0.0)), "cast": match.found}
        inputs: tuple[Term, ...] = (match["x"],)
        if owner is not None:
            _check_comes_back(match)
            options |= _own_weight(match, owner)
        elif "weight" in match:
            inputs += (match["weight"],)
        module = LigerRMSNorm(match["x"].width, match.get("eps", 0.0), **options)
        return Replacement(module, inputs, "rms_norm")


def _check_comes_back(match: Match) -> None:
    """Reject a norm that goes up to float32 and stays there: in float32, which shows no difference,
    its module would look like one whose result has the dtype of what comes in."""
    casts = [term for term in map(match.view, match.covered) if term.op == "cast"]
    goes_up = any(same(cast.operands[0], match["x"]) for cast in casts)
    comes_back = any(cast.operands[0].op in ("mul", "rsqrt") for cast in casts)
    if goes_up and not comes_back:
        raise Reject("its result stays in float32, whatever comes in", match.root)


def _own_weight(match: Match, owner: Owner) -> dict[str, Any]:
    """The owner's parameter and its name there."""
    if isinstance(owner.module, nn.RMSNorm):
        return {"weight": owner.module.weight}
    if "weight" not in match:
        return {}
    term: Term = match["weight"]
    if term.op != "get_attr":
        raise Reject("the weight is computed, not a parameter", term.node)
    name = owner.own_name(term.attributes["path"])
    if name not in dict(owner.module.named_parameters(recurse=False)):
        raise Reject("the weight is a buffer, not a parameter", term.node)
    return {"weight": owner.module.get_parameter(name), "weight_name": name}
