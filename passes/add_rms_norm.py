"""A residual connection and the RMSNorm of its sum, which is read again later.

    h = residual + attended; normed = self.post_attention_layernorm(h); ...; h + self.mlp(normed)
 ->
    normed, h = post_attention_layernorm = LigerAddRMSNorm((64,), eps=1e-06)(residual, attended)

The norm is the one of rms_norm.py, in all its spellings, and its module stays where it is; the sum
stands outside it. Whatever reads the sum must stand behind the norm, which gives both.
"""

from __future__ import annotations

from liger_fx.engine.dtypes import rounding
from liger_fx.engine.match import Match
from liger_fx.engine.operators import mean, rsqrt, square
from liger_fx.engine.pattern import Constant, Inner, Op, Tensor, anything, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term, bare, loses_nothing
from liger_fx.modules import LigerAddRMSNorm
from liger_fx.modules.casting import Cast
from liger_fx.passes.rms_norm import check_norm, norm_of, options_of

a, b = Tensor("a"), Tensor("b")
summed = Inner("sum", a + b, anywhere=True)
squares = mean(square(a + b))


class AddRMSNorm(Rule):
    """In the place of a norm module, or beside the code that spells one out."""

    name = "add_rms_norm"
    pattern = either(norm_of(summed), Op("add_rms_norm", (summed,), {"module": Constant("named")}))
    looks_like = either(
        rsqrt(either(squares + anything, squares)),
        Op("rms_norm", (a + b,)),
        Op("rms_norm", (a + b, anything)),
        Op("add_rms_norm", (a + b,)),
    )

    def check(self, match: Match) -> Cast | None:
        """How the norm's result is rounded; a and b are of one shape and dtype, and the sum's."""
        total = match.bare("sum")
        assert total.spec is not None
        for name in ("a", "b"):
            spec = match.spec(name)
            if spec != total.spec:
                raise Reject(f"{spec} is added, and the sum is {total.spec}", total.node)
        for cast in map(match.view, match.covered):
            if cast.op == "cast" and bare(cast) is total and not loses_nothing(cast):
                raise Reject("the sum is rounded before the norm", cast.node)
        if "named" in match:
            return None
        check_norm(match, total)
        return rounding(match, match.view(match.root), "a", "weight")

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        total = match.bare("sum")
        inputs: tuple[Term, ...] = (match["a"], match["b"])
        if owner is None:
            assert total.node is not None
            if total.node.meta.get("call") != match.root.meta.get("call"):
                return None  # a norm module of its own, whose place is for rms_norm.py to take
            if match.get("leaf") is not None or "named" in match:
                return None
        if "named" in match:
            module = match.view.module(match["named"])
        else:
            module = LigerAddRMSNorm(**options_of(match, total, owner))
            if owner is None and "weight" in match:
                inputs += (match["weight"],)
        return Replacement(module, inputs, self.name, (total,), called_with=(total,))
