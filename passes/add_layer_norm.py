"""A residual connection and the LayerNorm of its sum, which may be read again later.

    h = residual + attended; normed = self.ln_2(h); ...; h + self.mlp(normed)
 ->
    normed, h = ln_2 = LigerAddLayerNorm((64,), eps=1e-05, weight, bias)(residual, attended)

BERT's norms stand behind the sum, which nothing else reads: LayerNorm(dropout(h) + residual). The
norm is the one of layer_norm.py, in all its spellings; the rest is as in add_rms_norm.py.
"""

from __future__ import annotations

from liger_fx.engine.match import Match
from liger_fx.engine.operators import rsqrt, sqrt, variance
from liger_fx.engine.pattern import Constant, Inner, Op, Tensor, anything, either
from liger_fx.engine.rule import Owner, Replacement, Rule
from liger_fx.modules import LigerAddLayerNorm
from liger_fx.modules.casting import Cast
from liger_fx.passes.add_rms_norm import check_sum, has_place, of_sum
from liger_fx.passes.layer_norm import (
    check_norm,
    dtype_of_norm,
    factors_of,
    norm_of,
    options_of,
)

a, b = Tensor("a"), Tensor("b")
summed = Inner("sum", a + b, anywhere=True)
spread = either(variance(a + b) + anything, variance(a + b))


class AddLayerNorm(Rule):
    """In the place of a norm module, or beside the code that spells one out."""

    name = "add_layer_norm"
    pattern = either(
        norm_of(summed), Op("add_layer_norm", (summed,), {"module": Constant("named")})
    )
    looks_like = either(
        rsqrt(spread),
        sqrt(spread),
        Op("layer_norm", (a + b,)),
        Op("layer_norm", (a + b, anything, anything)),
        Op("add_layer_norm", (a + b,)),
    )

    def check(self, match: Match) -> Cast | None:
        """What dtype the norm has."""
        total = check_sum(match)
        if "named" in match:
            return None
        check_norm(match, total)
        return dtype_of_norm(match, total, "a")

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if not has_place(match, owner):
            return None
        if "named" in match:
            return of_sum(match, match.view.module(match["named"]), self.name)
        module = LigerAddLayerNorm(**options_of(match, match.bare("sum"), owner))
        return of_sum(match, module, self.name, () if owner is not None else factors_of(match))
