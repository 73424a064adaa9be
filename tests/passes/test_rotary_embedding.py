"""The rotary rule: layouts in and out, halves and parts of a head, pairs, and why it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liger_fx.passes.rotary_embedding import RotaryEmbedding
from tests.engine.graphs import BATCH, TOKENS, Formula, Rewritten, differences, rewritten, rows

T = torch.Tensor
HEADS, HEAD = 2, 8


def half_split(x: T) -> T:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def neighbours(x: T) -> T:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class Turn(nn.Module):
    """Turns q and k of (batch, HEADS, tokens, HEAD); the subclasses spell ``turn`` for one tensor.

    width: of cos and sin. heads: where q and k have their heads.
    """

    width, heads = HEAD, 1

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        cos, sin = cos.unsqueeze(self.heads), sin.unsqueeze(self.heads)
        return self.turn(q, cos, sin), self.turn(k, cos, sin)

    def turn(self, x: T, cos: T, sin: T) -> T:
        raise NotImplementedError


class Llama(Turn):
    def turn(self, x: T, cos: T, sin: T) -> T:
        return (x * cos) + (half_split(x) * sin)


class HeadsLast(Llama):
    heads = 2


class Olmo2(Turn):
    def turn(self, x: T, cos: T, sin: T) -> T:
        return (x * cos + half_split(x) * sin).to(x.dtype)


class Cohere2(Turn):
    def turn(self, x: T, cos: T, sin: T) -> T:
        wide = x.float()
        return (wide * cos + neighbours(wide) * sin).to(dtype=x.dtype)


class Phi3(Turn):
    """The first half of each head turns."""

    width = HEAD // 2

    def turn(self, x: T, cos: T, sin: T) -> T:
        turned, rest = x[..., : self.width], x[..., self.width :]
        return torch.cat([turned * cos + half_split(turned) * sin, rest], dim=-1)


class Glm4(Turn):
    """Half of each head, neighbours, and cos of which only the first half is read."""

    width = HEAD // 2

    def turn(self, x: T, cos: T, sin: T) -> T:
        cos = cos[..., : self.width // 2].repeat_interleave(2, dim=-1)
        sin = sin[..., : self.width // 2].repeat_interleave(2, dim=-1)
        turned, rest = x[..., : self.width], x[..., self.width :]
        return torch.cat([turned * cos + neighbours(turned) * sin, rest], dim=-1)


class DeepseekV3(Turn):
    """Neighbours in, halves out."""

    def turn(self, x: T, cos: T, sin: T) -> T:
        cos, sin = cos[..., : HEAD // 2], sin[..., : HEAD // 2]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class DeepseekV3Before(Turn):
    """The same as transformers 5.17 has it: taken apart by a view, then turned as halves."""

    def turn(self, x: T, cos: T, sin: T) -> T:
        batch, heads, tokens, width = x.shape
        x = x.view(batch, heads, tokens, width // 2, 2).transpose(4, 3)
        x = x.reshape(batch, heads, tokens, width)
        return x * cos + half_split(x) * sin


class DeepseekV4(Turn):
    """The last half of each head turns, in float32; cos has an entry a pair."""

    width = HEAD // 4

    def turn(self, x: T, cos: T, sin: T) -> T:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        rest, turned = x[..., : -2 * self.width], x[..., -2 * self.width :]
        turned = (turned.float() * cos + neighbours(turned).float() * sin).to(x.dtype)
        return torch.cat([rest, turned], dim=-1)


class GptOss(Turn):
    """Halves by chunk, and cos of half the width."""

    width = HEAD // 2

    def turn(self, x: T, cos: T, sin: T) -> T:
        a, b = torch.chunk(x, 2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Gptj(Turn):
    """Neighbours, heads after tokens, the new dimension by an index."""

    width, heads = HEAD // 2, 2

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
        cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
        return self.turn(q, cos, sin), self.turn(k, cos, sin)

    def turn(self, x: T, cos: T, sin: T) -> T:
        return x * cos + neighbours(x) * sin


class PairsByView(Turn):
    """Neighbours taken and joined by views."""

    width = HEAD // 2

    def turn(self, x: T, cos: T, sin: T) -> T:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


MODULES = {
    Llama: "8 of 8, half-split",
    HeadsLast: "8 of 8, half-split, heads_dim=2",
    Olmo2: "8 of 8, half-split, cast=input",
    Cohere2: "8 of 8, interleaved, cast=input",
    Phi3: "4 of 8, half-split",
    Glm4: "4 of 8, interleaved, half_tables=True",
    DeepseekV3: "8 of 8, interleaved -> half-split, half_tables=True",
    DeepseekV3Before: "8 of 8, interleaved -> half-split",
    GptOss: "8 of 8, half-split, half_tables=True",
    Gptj: "8 of 8, interleaved, half_tables=True, heads_dim=2",
    PairsByView: "8 of 8, interleaved, half_tables=True",
}


def inputs(
    module: Turn, dtype: torch.dtype = torch.float32, tables: torch.dtype | None = None
) -> tuple[T, ...]:
    """q, k, cos and sin; the halves of cos and sin differ, as no model's do."""
    generator = torch.Generator().manual_seed(3)
    shape = (HEADS, TOKENS) if module.heads == 1 else (TOKENS, HEADS)
    q, k = (torch.randn(BATCH, *shape, HEAD, generator=generator).to(dtype) for _ in "qk")
    angle = torch.randn(BATCH, TOKENS, module.width, generator=generator)
    return q, k, angle.cos().to(tables or dtype), angle.sin().to(tables or dtype)


def rotary(module: Turn, *given: T) -> Rewritten:
    return rewritten([RotaryEmbedding()], module, *(given or inputs(module)))


def calls(pair: Rewritten) -> list[str]:
    return [f"{type(m).__name__}({m.extra_repr()})" for m in pair.traced.root.children()]


@pytest.mark.parametrize("kind", MODULES)
def test_q_and_k_are_turned_by_one_module(kind: type[Turn]) -> None:
    pair = rotary(kind())
    assert pair.called() == ["LigerRotaryEmbedding"] and pair.reasons == []
    assert calls(pair) == [f"LigerRotaryEmbedding({MODULES[kind]})"]
    assert [node.target for node in pair.traced.graph.nodes if node.op == "call_method"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MODULES)
def test_it_computes_the_same(kind: type[Turn], dtype: torch.dtype) -> None:
    module = kind()
    if dtype is torch.float64 and kind is Cohere2:
        pytest.skip("the model's own code goes down to float32")
    given = inputs(module, dtype)
    pair = rotary(module, *given)
    assert pair.called() == ["LigerRotaryEmbedding"]
    assert max(differences(pair, *given)) < (1e-6 if dtype is torch.float32 else 1e-13)


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_in_mixed_dtypes_the_result_has_the_dtype_the_model_gives_it(
    kind: type[Turn], tables: torch.dtype
) -> None:
    module = kind()
    given = inputs(module, torch.bfloat16, tables)
    pair = rotary(module, *given)
    assert pair.called() == ["LigerRotaryEmbedding"], pair.reasons
    assert max(differences(pair, *given)) < 0.02


def test_the_graph_before_and_after() -> None:
    pair = rotary(Llama())
    assert pair.code == (
        "rotary_embedding = self.rotary_embedding(q, k, cos, sin)\n"
        "getitem_4 = rotary_embedding[0]\n"
        "getitem_5 = rotary_embedding[1]"
    )
    (site,) = pair.sites
    assert site.before[:4] == (
        "unsqueeze(cos, 1)",
        "unsqueeze(sin, 1)",
        "mul(x, unsqueeze)",
        "x[..., 4:]",
    )
    assert site.before[-1] == "add(mul_2, mul_3)" and "mul(x2, unsqueeze)" in site.before


class Alone(Turn):
    """One tensor turned, the other returned as it is."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        q = q.cos()
        return q * cos.unsqueeze(1) + half_split(q) * sin.unsqueeze(1), k


class OneAfterTheOther(Turn):
    """k is made of what q became: no node can stand for both."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = q * cos + half_split(q) * sin
        k = k + q
        return q, k * cos + half_split(k) * sin


class TwoTables(Turn):
    """q and k turn by different angles."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + half_split(q) * sin, k * sin + half_split(k) * cos


class TwoForms(Turn):
    """q turns as halves, k as neighbours."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + half_split(q) * sin, k * cos + neighbours(k) * sin


@pytest.mark.parametrize(
    ("kind", "count"),
    [(DeepseekV4, 2), (Alone, 1), (OneAfterTheOther, 2), (TwoTables, 2), (TwoForms, 2)],
)
def test_what_cannot_go_together_is_turned_alone(kind: type[Turn], count: int) -> None:
    pair = rotary(kind())
    assert pair.called() == ["LigerSingleRotaryEmbedding"] * count
    assert max(differences(pair, *inputs(kind()))) < 1e-6


def test_the_rest_of_a_head_may_come_from_elsewhere_and_stays_then() -> None:
    class OtherRest(Phi3):
        def turn(self, x: T, cos: T, sin: T) -> T:
            turned, rest = x[..., : self.width], x[..., : self.width]
            return torch.cat([turned * cos + half_split(turned) * sin, rest], dim=-1)

    pair = rotary(OtherRest())
    assert calls(pair) == ["LigerSingleRotaryEmbedding(4 of 4, half-split)"]
    assert pair.code.count("torch.cat") == 2
    assert max(differences(pair, *inputs(OtherRest()))) < 1e-6


# -- why it refuses ------------------------------------------------------------


class NotOne(Turn):
    """What a subclass does is no turn that the module knows."""


class TurnedBack(NotOne):
    def turn(self, x: T, cos: T, sin: T) -> T:
        return x * cos - half_split(x) * sin


class SignsSwapped(NotOne):
    def turn(self, x: T, cos: T, sin: T) -> T:
        return x * cos + torch.cat((x[..., 4:], -x[..., :4]), -1) * sin


class HalvesSwapped(NotOne):
    def turn(self, x: T, cos: T, sin: T) -> T:
        return x * cos + torch.cat((-x[..., :4], x[..., 4:]), -1) * sin


class OtherTensor(NotOne):
    def turn(self, x: T, cos: T, sin: T) -> T:
        return x * cos + half_split(x.cos()) * sin


class OneTable(NotOne):
    """Heads of cos and of sin at different places."""

    def turn(self, x: T, cos: T, sin: T) -> T:
        return x * cos + half_split(x) * sin.transpose(1, 2).squeeze(2).unsqueeze(1).exp()


class ReadInside(NotOne):
    def turn(self, x: T, cos: T, sin: T) -> T:
        turned = half_split(x)
        return x * cos + turned * sin + turned


class ChangedInside(NotOne):
    def turn(self, x: T, cos: T, sin: T) -> T:
        x = x.cos()
        straight = x * cos
        cos.add_(0)
        return straight + half_split(x) * sin


class Complex(NotOne):
    width = HEAD // 2

    def turn(self, x: T, cos: T, sin: T) -> T:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3)


REASONS = {
    TurnedBack: "wanted ",
    SignsSwapped: "wanted neg(upper(x)), found q[..., 4:] at",
    HalvesSwapped: "wanted ",
    OtherTensor: "wanted x (",
    OneTable: "wanted unsqueeze(sin), found exp(unsqueeze_2) at",
    ReadInside: "an inner result is also read by add(",
    ChangedInside: "add_(",
    Complex: "it turns complex numbers, which no named module does (view_as_real(",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_no_such_turn_stays_and_the_reason_says_why(kind: type[Turn]) -> None:
    pair = rotary(kind())
    assert pair.called() == [] and len(pair.reasons) == 2
    assert pair.reasons[0].startswith(REASONS[kind]), pair.reasons
    given = inputs(kind())
    for one, two in zip(pair.before(*given), pair.after(*given), strict=True):
        assert torch.equal(one, two)


def test_tables_that_are_not_laid_out_for_the_heads() -> None:
    given = inputs(Llama())
    four = tuple(t.unsqueeze(1).expand(-1, 2, -1, -1) for t in given[2:])

    class FourDimensions(Turn):
        def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
            cos, sin = cos.unsqueeze(1)[:, 0], sin.unsqueeze(1)[:, 0]
            return q * cos + half_split(q) * sin, k

    pair = rotary(FourDimensions(), *given[:2], *four)
    assert pair.called() == [] and pair.reasons[0].startswith("wanted ")


class Broadcast(Turn):
    """cos of one token for all of them, or tables of two shapes or dtypes."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + half_split(q) * sin, k


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cos, sin: (cos[:, :1], sin[:, :1]), "is broadcast over x of"),
        (lambda cos, sin: (cos, sin[:1]), "cos is float32"),
        (lambda cos, sin: (cos, sin.double()), "cos is float32"),
    ],
)
def test_tables_of_other_shapes_and_dtypes(change: Any, reason: str) -> None:
    q, k, cos, sin = inputs(Llama())
    pair = rotary(Broadcast(), q, k, *change(cos, sin))
    assert pair.called() == [] and reason in pair.reasons[0]


def test_one_row_of_angles_for_the_whole_batch() -> None:
    q, k, cos, sin = inputs(Llama())
    given = (q, k, cos[:1], sin[:1])
    pair = rotary(Llama(), *given)
    assert pair.called() == ["LigerRotaryEmbedding"] and max(differences(pair, *given)) < 1e-6


# -- random spellings ----------------------------------------------------------


def spelled(choose: random.Random, fault: str | None = None) -> Any:
    """x * cos + (-b, a) * sin for x = (a, b) in a random spelling, with one fault or none."""
    halves = choose.choice(
        [
            lambda x: (x[..., :4], x[..., 4:]),
            lambda x: x.chunk(2, dim=-1),
            lambda x: torch.split(x, 4, -1),
            lambda x: x.unflatten(-1, (2, 4)).unbind(-2),
        ]
    )
    negative = choose.choice([lambda t: -t, torch.neg, lambda t: t * -1])
    product = choose.choice([torch.mul, lambda a, b: a * b, lambda a, b: b.mul(a)])
    swapped, upcast = choose.random() < 0.5, choose.random() < 0.5

    def turn(x: T, cos: T, sin: T) -> T:
        dtype, x = x.dtype, x.float() if upcast else x
        a, b = halves(x)
        if fault == "swapped":
            a, b = b, a
        partner = (negative(b), a) if fault != "sign" else (b, negative(a))
        partner = torch.cat(partner, -1) if fault != "tensor" else half_split(x.cos())
        straight, crossed = product(x, cos), product(partner, sin)
        if fault == "minus":
            y = straight - crossed
        else:
            y = crossed + straight if swapped else torch.add(straight, crossed)
        return y.to(dtype) if upcast else y

    return turn


class Spelled(Turn):
    def __init__(self, turn: Any) -> None:
        super().__init__()
        self.turn = turn


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_spelling_is_found_and_computes_the_same(choose: random.Random) -> None:
    module = Spelled(spelled(choose))
    pair = rotary(module)
    assert pair.reasons == [] and pair.called() == ["LigerRotaryEmbedding"]
    assert max(differences(pair, *inputs(module))) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["swapped", "sign", "tensor", "minus"]))
def test_no_spelling_of_something_else_is(choose: random.Random, fault: str) -> None:
    pair = rotary(Spelled(spelled(choose, fault)))
    assert pair.called() == [] and len(pair.reasons) == 2


def test_heads_of_a_width_that_varies() -> None:
    def function(m: Formula, x: T) -> T:
        q = x.transpose(1, 2).repeat(1, 1, 2)
        a, b = q.chunk(2, dim=-1)
        cos, sin = q.cos().unsqueeze(1), q.sin().unsqueeze(1)
        return q * cos + torch.cat((-b, a), dim=-1) * sin

    (reason,) = rewritten([RotaryEmbedding()], Formula(function), rows()).reasons
    assert reason.startswith("wanted upper(x), found chunk[1], whose width is not fixed at test_")
