"""The RMSNorm of each head of q and k, and the rotary embedding of both.

    q = self.q_norm(q_proj.view(hidden_shape)).transpose(1, 2)
    k = self.k_norm(k_proj.view(hidden_shape)).transpose(1, 2)
    q2, k2 = apply_rotary_pos_emb(q, k, cos, sin)
 ->
    q2, k2 = LigerQKNormRotaryEmbedding(eps=1e-06, exchanged=True, 128 of 128, half-split)(
        view, view_1, q_norm_weight, k_norm_weight, cos, sin)

The norm is the one of rms_norm.py and the turn the one of rotary_embedding.py, in all their
spellings; heads and tokens may change places before the norm, after it, or not at all. q and k go
together, or one of them alone. What does not fit here is left to those two rules.

Henry et al., "Query-Key Normalization for Transformers", 2020.
"""

from __future__ import annotations

from typing import Any

from liger_fx.engine.dtypes import rounded_to
from liger_fx.engine.facts import computes
from liger_fx.engine.layers import parameters_of
from liger_fx.engine.match import Match
from liger_fx.engine.operators import cat, even, interleave, lower, odd, upper
from liger_fx.engine.pattern import Constant, Inner, Op, Pattern, Tensor, anything, choice, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term, describe, is_transparent, loses_nothing
from liger_fx.modules import LigerNormRotaryEmbedding, LigerQKNormRotaryEmbedding
from liger_fx.modules.casting import Cast
from liger_fx.passes.rms_norm import check_norm, norm_of
from liger_fx.passes.rotary_embedding import heads_dim, turned


def heads_of(normed: Pattern) -> Pattern:
    """What is turned: the norm as it is, or with heads and tokens exchanged."""
    exchanged = Op("transpose", (normed,), {"dims": (-3, -2)})
    return choice("exchanged", {True: exchanged, False: normed})


def first_of(head: Pattern) -> Pattern:
    """The first elements of each head, where these alone are turned."""
    return Op("slice", (head,), {"start": 0, "stop": Constant("split"), "step": 1})


def rest_of(head: Pattern) -> Pattern:
    """The elements after those."""
    return Op("slice", (head,), {"start": Constant("split"), "stop": Constant("end"), "step": 1})


def beginnings(head: Pattern) -> Pattern:
    """What the turn of a head begins with, in every form."""
    halves, neighbours = (lower(head), upper(head)), (even(head), odd(head))
    products = [a * anything - b * anything for a, b in (halves, neighbours)]
    return either(
        cat(-halves[1], anything),
        interleave(-neighbours[1], anything),
        *(join(one, anything) for one in products for join in (cat, interleave)),
    )


head = heads_of(Inner("normed", norm_of(Tensor("x")), apart=True))
any_head = heads_of(norm_of(anything))


class QKNormRotary(Rule):
    """A child of the attention module, to which the norms' weights are passed."""

    name = "qk_norm_rotary"
    pattern = either(cat(turned(first_of(head)), rest_of(head)), turned(head))
    looks_like = either(beginnings(any_head), beginnings(first_of(any_head)))

    def check(self, match: Match) -> dict[str, Any]:
        """What the module is made with."""
        _check_read_here_alone(match)
        check_norm(match, match["x"])
        if "weight" not in match and match.get("leaf") is None:
            raise Reject("the norm has no weight", match.root)
        head_dim, layout = match["x"].width, match["layout"]
        rotary_dim = match.get("split", head_dim)
        if match.get("end", head_dim) != head_dim:
            raise Reject("what stands beside the turned part is not the rest of it", match.root)
        norm_cast, cast = _roundings(match)
        return {
            **layout._asdict(),
            "eps": match.get("eps", 0.0),
            "offset": float(match.get("offset", 0.0)),
            "norm_cast": norm_cast,
            "cast": cast,
            "exchanged": match["exchanged"],
            "heads_dim": heads_dim(
                match, match.view(match.root), rotary_dim // (2 if layout.half_tables else 1)
            ),
            "rotary_dim": rotary_dim,
            "head_dim": head_dim,
        }

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is not None:
            return None
        inputs = (match["x"], _weight(match), match["cos"], match["sin"])
        return Replacement(LigerNormRotaryEmbedding(**match.found), inputs, self.name)

    def pair(self, first: Match, second: Match) -> Replacement | None:
        weights = _weight(first), _weight(second)
        if first.found != second.found or _dtypes(first) != _dtypes(second):
            return None
        if not all(first.view.same(first[name], second[name]) for name in ("cos", "sin")):
            return None
        inputs = (first["x"], second["x"], *weights, first["cos"], first["sin"])
        return Replacement(LigerQKNormRotaryEmbedding(**first.found), inputs, self.name)


def _roundings(match: Match) -> tuple[Cast, Cast]:
    """How the norm is rounded, and how the turned norm is."""
    normed, value = _as_rounded(match), match.view(match.root)
    assert normed.spec is not None
    if "split" in match:
        value = value.operands[0]
    (x, weight), found = _dtypes(match), normed.spec.dtype
    return (
        rounded_to(found, normed, x, weight, match.root),
        rounded_to(match.root_spec.dtype, value, found, match.spec("cos").dtype, match.root),
    )


def _as_rounded(match: Match) -> Term:
    """The norm before casts that change no value of it and are not its own module's."""
    normed, home = match.inner["normed"], match.root.meta.get("call")
    while is_transparent(normed) and (normed.op == "alias" or loses_nothing(normed)):
        if normed.node is not None and normed.node.meta.get("call") != home:
            break
        normed = normed.operands[0]
    return normed


def _weight(match: Match) -> Term:
    """The norm's weight, as a value to pass on."""
    if "weight" in match:
        weight: Term = match["weight"]
        return weight
    (weight,) = parameters_of(match, match["leaf"])
    return weight


def _dtypes(match: Match) -> tuple[Any, Any]:
    """Those of what comes in and of the norm's weight."""
    weight = _weight(match).spec
    assert weight is not None
    return match.spec("x").dtype, weight.dtype


def _check_read_here_alone(match: Match) -> None:
    """Reject a norm that something else reads as well, through whatever views: it would stay."""
    inside, pending = {*match.covered, match.root}, [match.inner["normed"].node]
    while pending:
        node = pending.pop()
        assert node is not None
        for user in node.users:
            if user not in inside:
                raise Reject(f"the norm is also read by {describe(user)}", node)
            if not computes(user):
                pending.append(user)
