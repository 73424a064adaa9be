"""A residual connection and the RMSNorm of its sum, which is read again later.

    h = residual + attended; normed = self.post_attention_layernorm(h); ...; h + self.mlp(normed)
 ->
    normed, h = post_attention_layernorm = LigerAddRMSNorm((64,), eps=1e-06)(residual, attended)

The norm is the one of rms_norm.py, in all its spellings, and its module stays where it is; the sum
stands outside it. Whatever reads the sum must stand behind the norm, which gives both.
"""

from __future__ import annotations

from torch import nn

from liger_fx.engine.dtypes import rounding
from liger_fx.engine.match import Match
from liger_fx.engine.operators import mean, rsqrt, sqrt, square
from liger_fx.engine.pattern import Constant, Inner, Op, Tensor, anything, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term, bare, loses_nothing
from liger_fx.modules import LigerAddRMSNorm
from liger_fx.modules.casting import Cast
from liger_fx.passes.rms_norm import check_norm, norm_of, options_of

a, b = Tensor("a"), Tensor("b")
summed = Inner("sum", a + b, anywhere=True)
squares = either(mean(square(a + b)) + anything, mean(square(a + b)))


class AddRMSNorm(Rule):
    """In the place of a norm module, or beside the code that spells one out."""

    name = "add_rms_norm"
    pattern = either(norm_of(summed), Op("add_rms_norm", (summed,), {"module": Constant("named")}))
    looks_like = either(
        rsqrt(squares),
        sqrt(squares),
        Op("rms_norm", (a + b,)),
        Op("rms_norm", (a + b, anything)),
        Op("add_rms_norm", (a + b,)),
    )

    def check(self, match: Match) -> Cast | None:
        """How the norm's result is rounded."""
        total = check_sum(match)
        if "named" in match:
            return None
        check_norm(match, total)
        return rounding(match, match.view(match.root), "a", "weight")

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if not has_place(match, owner):
            return None
        total = match.bare("sum")
        if "named" in match:
            return of_sum(match, match.view.module(match["named"]), self.name)
        module = LigerAddRMSNorm(**options_of(match, total, owner))
        factors = (match["weight"],) if owner is None and "weight" in match else ()
        return of_sum(match, module, self.name, factors)


def check_sum(match: Match) -> Term:
    """The sum that a norm is taken of. Reject one whose parts are not of its shape and dtype, or
    that is rounded before the norm."""
    total = match.bare("sum")
    assert total.spec is not None
    for name in ("a", "b"):
        spec = match.spec(name)
        if spec != total.spec:
            raise Reject(f"{spec} is added, and the sum is {total.spec}", total.node)
    for cast in map(match.view, match.covered):
        if cast.op == "cast" and bare(cast) is total and not loses_nothing(cast):
            raise Reject("the sum is rounded before the norm", cast.node)
    return total


def has_place(match: Match, owner: Owner | None) -> bool:
    """Whether a module for the sum and its norm can stand in the owner's place, or beside: not
    where the norm is a module of its own, whose place is for the rule of the plain norm to take,
    nor where its weight is no node of the graph."""
    if owner is not None:
        return True
    node = match.bare("sum").node
    assert node is not None
    is_other_call = node.meta.get("call") != match.root.meta.get("call")
    return not is_other_call and match.get("leaf") is None and "named" not in match


def of_sum(
    match: Match, module: nn.Module, name: str, factors: tuple[Term, ...] = ()
) -> Replacement:
    """The named module called with the parts of the sum, which is its second result."""
    total = match.bare("sum")
    return Replacement(
        module, (match["a"], match["b"], *factors), name, (total,), called_with=(total,)
    )
