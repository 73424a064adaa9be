"""Applying the rotary position embedding, to q and k together or to one tensor alone.

    cos = cos.unsqueeze(1); sin = sin.unsqueeze(1)
    q2 = q * cos + cat((-q[..., 8:], q[..., :8]), -1) * sin
    k2 = k * cos + cat((-k[..., 8:], k[..., :8]), -1) * sin
 ->
    q2, k2 = LigerRotaryEmbedding(16 of 16, half-split)(q, k, cos, sin)

Su et al., "RoFormer", 2021. The two ends of a pair are the halves of the head (half-split) or its
neighbours (interleaved), and a model may read one and write the other. cos and sin hold an entry
for each element, or one for each pair. Where a model turns only the first part of each head, the
module copies the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from liger_fx.engine.dtypes import rounding
from liger_fx.engine.match import Match
from liger_fx.engine.operators import cat, even, interleave, lower, odd, unsqueeze, upper
from liger_fx.engine.pattern import Constant, Op, Pattern, Tensor, anything, choice, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term
from liger_fx.modules import LigerRotaryEmbedding, LigerSingleRotaryEmbedding

rest, heads = Tensor("rest"), Constant("heads")


def table(name: str, half: bool) -> Pattern:
    """cos or sin, a dimension for the heads added; ``half``: an entry a pair, repeated."""
    entries: Pattern = Tensor(name)
    return unsqueeze(
        Op("repeat_interleave", (entries,), {"repeats": 2}) if half else entries, heads
    )


def turned_whole(x: Pattern, partner: Pattern, half: bool = False) -> Pattern:
    """x * cos + partner * sin, where ``partner`` is (-b, a) for x = (a, b)."""
    return x * table("cos", half) + partner * table("sin", half)


def turned_ends(a: Pattern, b: Pattern) -> tuple[Pattern, Pattern]:
    """The ends of each pair by themselves: cos and sin hold one entry a pair."""
    cos, sin = table("cos", False), table("sin", False)
    return a * cos - b * sin, b * cos + a * sin


class Layout(NamedTuple):
    """How the pairs lie in what is read and in what is written, and what cos and sin hold."""

    interleaved_in: bool
    interleaved_out: bool
    half_tables: bool


def turned(x: Pattern) -> Pattern:
    """Every form of x turned; the layout is captured."""
    ends = (lower(x), upper(x)), (even(x), odd(x))
    return choice(
        "layout",
        {
            Layout(False, False, False): turned_whole(x, cat(-upper(x), lower(x))),
            Layout(True, True, True): either(
                turned_whole(x, interleave(-odd(x), even(x)), half=True),
                interleave(*turned_ends(*ends[1])),
            ),
            Layout(True, True, False): turned_whole(x, interleave(-odd(x), even(x))),
            Layout(False, False, True): cat(*turned_ends(*ends[0])),
            Layout(True, False, True): cat(*turned_ends(*ends[1])),
            Layout(False, True, True): interleave(*turned_ends(*ends[0])),
        },
    )


complex_turned = Op("view_as_real", (anything,))
products = anything * anything
plus, minus = products + products, products - products


class Found(NamedTuple):
    """The tensor that is read, the whole of each head, and what the module is made with."""

    source: Term
    options: dict[str, Any]


class RotaryEmbedding(Rule):
    """A child of the attention module, whose code turns q and k."""

    name = "rotary_embedding"
    pattern = either(cat(turned(Tensor("x")), rest), turned(Tensor("x")), complex_turned)
    looks_like = either(
        *(join(-anything, anything) for join in (cat, interleave)),
        *(join(anything, -anything) for join in (cat, interleave)),
        *(join(minus, plus) for join in (cat, interleave)),
        *(join(plus, minus) for join in (cat, interleave)),
        complex_turned,
    )

    def check(self, match: Match) -> Found:
        """Look at the layout of heads and tokens, the tables' widths and the dtypes."""
        if "x" not in match:
            raise Reject("it turns complex numbers, which no named module does", match.root)
        layout, source = match["layout"], match["x"]
        turned_term = match.view(match.root)
        if source.op == "deinterleave":
            layout, source = layout._replace(interleaved_in=True), source.operands[0]
        rotary_dim = source.width
        if "rest" in match:
            source = _head(match, source)
            turned_term = turned_term.operands[0]
        place = heads_dim(match, source, rotary_dim // (2 if layout.half_tables else 1))
        options = {
            **layout._asdict(),
            "cast": rounding(match, turned_term, "x", "cos"),
            "heads_dim": place,
            "rotary_dim": rotary_dim,
            "head_dim": source.width,
        }
        return Found(source, options)

    def build(self, match: Match, owner: Owner | None) -> Replacement:
        module = LigerSingleRotaryEmbedding(**match.found.options)
        inputs = (match.found.source, match["cos"], match["sin"])
        return Replacement(module, inputs, self.name)

    def pair(self, first: Match, second: Match) -> Replacement | None:
        if first.found.options != second.found.options:
            return None
        if not all(first.view.same(first[name], second[name]) for name in ("cos", "sin")):
            return None
        module = LigerRotaryEmbedding(**first.found.options)
        inputs = (first.found.source, second.found.source, first["cos"], first["sin"])
        return Replacement(module, inputs, self.name)


def _head(match: Match, part: Term) -> Term:
    """The tensor whose first elements are ``part`` and whose others are the rest."""
    rest: Term = match["rest"]
    if part.op == rest.op == "slice" and match.view.same(part.operands[0], rest.operands[0]):
        head, begin, end = part.operands[0], part.attributes, rest.attributes
        joined = (begin["start"], begin["stop"], end["stop"], begin["step"], end["step"])
        if joined == (0, end["start"], head.width, 1, 1):
            return head
    raise Reject("what stands beside the turned part is not the rest of the same head", rest.node)


def heads_dim(match: Match, heads: Term, width: int) -> int:
    """Where ``heads`` that are turned lie, read off cos, of ``width`` entries: 1 for (batch, heads,
    tokens, D), 2 for (batch, tokens, heads, D). Reject what is laid out otherwise."""
    cos, sin, spec = match.spec("cos"), match.spec("sin"), heads.spec
    place = {-3: 1, -2: 2}.get(match["heads"])
    if spec is None or len(spec.shape) != 4 or len(cos.shape) != 3 or place is None:
        raise Reject(f"cos of {cos} is not laid out for x of {spec}", match.root)
    if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
        raise Reject(f"cos is {cos} and sin {sin}", match.root)
    batch, tokens = spec.shape[0], spec.shape[3 - place]
    if cos.shape not in ((1, tokens, width), (batch, tokens, width)):
        raise Reject(f"cos of {cos} is broadcast over x of {spec}", match.root)
    return place
