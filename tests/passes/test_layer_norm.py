"""The LayerNorm rule: what it finds, what it puts there, what it computes, and why it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from liger_fx.modules import LigerLayerNorm
from liger_fx.passes.layer_norm import LayerNorm
from liger_fx.passes.rms_norm import RMSNorm
from tests.engine.graphs import (
    BATCH,
    TOKENS,
    Around,
    Formula,
    Rewritten,
    differences,
    rewritten,
    rows,
)

T = torch.Tensor
WIDTH, EPS = 12, 3e-4


class Norm(nn.Module):
    """A norm module; the subclasses spell it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(shape or WIDTH))
        self.shift = nn.Parameter(0.3 * torch.randn(shape or WIDTH))


class Scaled(nn.Module):
    """One without a bias."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(shape or WIDTH))


class Cohere(Scaled):
    def forward(self, x: T) -> T:
        dtype, x = x.dtype, x.to(torch.float32)
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + EPS)
        return (self.scale.to(torch.float32) * x).to(dtype)


class Textbook(Norm):
    def forward(self, x: T) -> T:
        centered = x - x.mean(-1, keepdim=True)
        return (
            self.scale * centered / torch.sqrt(centered.square().mean(-1, True) + EPS) + self.shift
        )


class OwnVariance(Norm):
    def forward(self, x: T) -> T:
        variance = x.var(-1, unbiased=False, keepdim=True)
        return self.shift + (x - x.mean(-1, keepdim=True)) / (variance + EPS).sqrt() * self.scale


class Olmo(nn.Module):
    def forward(self, x: T) -> T:
        return F.layer_norm(x.to(dtype=torch.float32), (WIDTH,), None, None, eps=EPS).to(x.dtype)


class Functional(Norm):
    def forward(self, x: T) -> T:
        return F.layer_norm(x, (WIDTH,), self.scale, self.shift, EPS)


class Nemotron(Norm):
    def forward(self, x: T) -> T:
        return F.layer_norm(x, (WIDTH,), self.scale + 1, self.shift, EPS)


class Chameleon(Norm):
    def forward(self, x: T) -> T:
        return F.layer_norm(x, (WIDTH,), None, None, eps=EPS) * self.scale + self.shift


class WithoutBias(Scaled):
    def forward(self, x: T) -> T:
        return torch.layer_norm(x, (x.shape[-1],), self.scale, eps=EPS)


MODULES = {
    Cohere: "weight",
    Textbook: "weight, bias, cast=promote",
    OwnVariance: "weight, bias, cast=promote",
    Olmo: "",
    Functional: "weight, bias, cast=autocast",
    Nemotron: "1 + weight, bias, cast=autocast",
    Chameleon: "weight, bias, cast=promote",
    WithoutBias: "weight, cast=autocast",
}
OF_TORCH = (Functional, Nemotron, WithoutBias)  # which refuses factors shorter than its input


def norm(module: nn.Module, *inputs: T) -> Rewritten:
    return rewritten([LayerNorm(), RMSNorm()], module, *(inputs or (rows(WIDTH),)))


@pytest.mark.parametrize("kind", MODULES)
def test_a_norm_module_is_replaced_by_its_named_one(kind: type[nn.Module]) -> None:
    pair = norm(Around(kind()))
    assert len(pair.done) == 1 and pair.reasons == []
    assert pair.code == "sin = x.sin()\ninner = self.inner(sin)\ncos = inner.cos()"
    module = pair.traced.root.inner
    shown = ", ".join(filter(None, ("(12,), eps=0.0003", MODULES[kind])))
    assert isinstance(module, LigerLayerNorm) and module.extra_repr() == shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MODULES)
def test_it_computes_the_same(kind: type[nn.Module], dtype: torch.dtype) -> None:
    if dtype is torch.float64 and kind in (Cohere, Olmo):
        pytest.skip("the model's own code goes down to float32")
    x = rows(WIDTH, dtype) + 2
    pair = norm(Around(kind()).to(dtype), x)
    bound = 1e-6 if dtype is torch.float32 else 1e-13
    assert pair.done and max(differences(pair, x)) < bound


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODULES)
def test_in_mixed_dtypes_the_result_has_the_dtype_the_model_gives_it(
    kind: type[nn.Module], x: torch.dtype, factors: torch.dtype
) -> None:
    if kind in OF_TORCH and factors is torch.bfloat16 and x is not torch.bfloat16:
        pytest.skip("PyTorch refuses it")
    inputs = rows(WIDTH, x)
    pair = norm(Around(kind()).to(factors), inputs)
    assert pair.done, pair.reasons
    assert max(differences(pair, inputs)) < 0.02  # and equal dtypes, which differences() asserts


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_torchs_own_norm_is_replaced_with_its_parameters(options: dict[str, bool]) -> None:
    norms = nn.Sequential(nn.LayerNorm(WIDTH, EPS, **options), nn.LayerNorm(WIDTH, **options))
    for parameter in norms.parameters():
        nn.init.normal_(parameter)
    pair = norm(norms)
    assert [(s.path, s.after_class) for s in pair.done] == [
        ("0", "LigerLayerNorm"), ("1", "LigerLayerNorm")
    ]  # fmt: skip
    assert [m.eps for m in pair.traced.root.children()] == [EPS, 1e-5] and pair.reasons == []
    assert max(differences(pair, rows(WIDTH))) < 1e-6


class OfTorch(nn.LayerNorm):
    """As NemotronLayerNorm1P and others are: a subclass with code of its own."""

    def forward(self, x: T) -> T:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Permuting(nn.LayerNorm):
    """As the norms of pictures, channels first."""

    def forward(self, x: T) -> T:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_subclasses_are_taken_for_what_they_compute() -> None:
    pair = norm(Around(OfTorch(WIDTH)))
    assert pair.traced.root.inner.extra_repr().endswith("1 + weight, bias, cast=autocast")
    assert max(differences(pair, rows(WIDTH))) < 1e-6
    turned = rows(WIDTH).transpose(1, 2).contiguous()
    pair = norm(Around(Permuting(WIDTH)), turned)
    assert "self.inner.layer_norm(transpose, " in pair.code
    assert max(differences(pair, turned)) < 1e-6


def test_factors_of_another_module_are_arguments() -> None:
    def function(m: Formula, x: T) -> T:
        return F.layer_norm(x, (8,), m.w, m.b, EPS).exp()

    pair = norm(Formula(function), rows())
    assert "= self.layer_norm(x, w, b)" in pair.code
    assert max(differences(pair, rows())) < 1e-6


def test_factors_for_each_head_leave_the_norm_without_them() -> None:
    """Cohere's norms of q and k."""
    for kind in (Cohere, Chameleon):
        pair = norm(Around(kind(TOKENS, WIDTH)))
        assert pair.called() == ["LigerLayerNorm"] and len(pair.done) == 1
        assert max(differences(pair, rows(WIDTH))) < 1e-6


def test_per_head_on_a_view() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm = nn.LayerNorm(6)

        def forward(self, x: T) -> T:
            return self.q_norm(x.view(*x.shape[:2], 2, 6)).transpose(1, 2)

    pair = norm(Heads())
    assert pair.done[0].path == "q_norm" and max(differences(pair, rows(WIDTH))) < 1e-6


def test_a_residual_added_to_the_norm_is_no_bias() -> None:
    def function(m: Formula, x: T) -> T:
        return F.layer_norm(x, (8,), eps=EPS) * m.w + x

    pair = norm(Formula(function), rows())
    assert "= self.layer_norm(x, w)" in pair.code and "add = " in pair.code
    assert max(differences(pair, rows())) < 1e-6


# -- why it refuses ------------------------------------------------------------


class SumOfSquares(Norm):
    def forward(self, x: T) -> T:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


class WrongDim(Norm):
    def forward(self, x: T) -> T:
        centered = x - x.mean(1, keepdim=True)
        return centered * torch.rsqrt(centered.pow(2).mean(1, keepdim=True) + EPS)


class OtherTensor(Norm):
    def forward(self, x: T) -> T:
        other = x.exp()
        other = other - other.mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(other.pow(2).mean(-1, True) + EPS)


class Unbiased(Norm):
    def forward(self, x: T) -> T:
        return (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS)


class EpsOutside(Norm):
    def forward(self, x: T) -> T:
        return (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + EPS)


class RootIsReadToo(Norm):
    def forward(self, x: T) -> T:
        centered = x - x.mean(-1, keepdim=True)
        root = torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS)
        return centered * root + root


class TwoDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((2, 6), EPS)

    def forward(self, x: T) -> T:
        return self.norm(x.view(*x.shape[:2], 2, 6)).flatten(2)


REASONS = {
    SumOfSquares: "it subtracts the mean first: a LayerNorm, not an RMSNorm",  # the other rule's
    WrongDim: "dims is (-2,), not (-1,), in mean(",
    OtherTensor: "wanted x (sin(x)) again, found exp(sin) at",
    Unbiased: "correction is 1, not 0, in var(sin, -1, True) at",
    EpsOutside: "wanted ",
    RootIsReadToo: "an inner result is also read by add(mul, rsqrt)",
    TwoDimensions: "it is the norm of the last 2 dimensions (norm(view) at",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_no_norm_stays_and_the_reason_says_why(kind: type[nn.Module]) -> None:
    pair = norm(Around(kind()))
    assert pair.done == []
    own = [s.reason for s in pair.sites if s.rule == "layer_norm"]
    if kind is SumOfSquares:
        assert own == [] and len(pair.reasons) == 1
    else:
        assert len(own) == 1 and own[0] is not None and own[0].startswith(REASONS[kind]), own
    assert torch.equal(pair.before(rows(WIDTH)), pair.after(rows(WIDTH)))


def test_a_norm_of_torch_that_is_not_plain_stays() -> None:
    class Twice(nn.Module):
        def forward(self, weight: T) -> T:
            return 2 * weight

    module = nn.Sequential(nn.LayerNorm(WIDTH))
    parametrize.register_parametrization(module[0], "weight", Twice())
    pair = norm(module)
    assert [r.partition(" (")[0] for r in pair.reasons] == [
        "it is a ParametrizedLayerNorm, not a plain LayerNorm"
    ]
    assert torch.equal(pair.before(rows(WIDTH)), pair.after(rows(WIDTH)))


def test_a_hook_keeps_it_and_is_named() -> None:
    module = nn.Sequential(nn.LayerNorm(WIDTH))
    module[0].register_forward_hook(lambda m, args, result: result * 2)
    pair = norm(module)
    assert [r for r in pair.reasons if "a hook stands on 0, which would not run" in r]
    assert torch.equal(pair.before(rows(WIDTH)), pair.after(rows(WIDTH)))


def test_less_another_mean_it_is_an_rms_norm_of_the_difference() -> None:
    def function(m: Formula, x: T) -> T:
        centered = x - x.exp().mean(-1, keepdim=True)
        return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS)

    pair = norm(Formula(function), rows())
    assert [s.rule for s in pair.done] == ["rms_norm"]
    assert max(differences(pair, rows())) < 1e-6


def test_a_row_of_a_width_that_varies() -> None:
    pair = norm(Formula(lambda m, x: F.layer_norm(x, (x.shape[-1],))), rows(BATCH))
    (reason,) = pair.reasons
    assert reason.startswith("the width of its rows is not fixed")


def test_a_class_of_that_name_that_computes_something_else() -> None:
    class OddLayerNorm(Norm):
        def forward(self, x: T) -> T:
            return self.scale * F.normalize(x, dim=-1)

    assert norm(nn.Sequential(OddLayerNorm())).reasons == ["no layer_norm was found in it"]


# -- random spellings ------------------------------------------------------------


def spelled(choose: random.Random, fault: str | None = None) -> Any:
    """LayerNorm in a random spelling, with one fault or none."""
    mean = choose.choice(
        [
            lambda s: s.mean(-1, keepdim=True),
            lambda s: torch.mean(s, dim=2, keepdim=True),
            lambda s: s.mean(-1).unsqueeze(-1),
            lambda s: s.sum(-1, keepdim=True) / WIDTH,
        ]
    )
    spread = choose.choice(
        [
            lambda x: mean((x - mean(x)).pow(2)),
            lambda x: mean(torch.square(x - mean(x))),
            lambda x: x.var(-1, unbiased=False, keepdim=True),
            lambda x: torch.var(x, dim=-1, correction=0, keepdim=True),
        ]
    )
    if fault == "correction":
        spread = lambda x: x.var(-1, keepdim=True)  # noqa: E731
    over = choose.choice(
        [
            lambda x, v: x * torch.rsqrt(v),
            lambda x, v: x / v.sqrt(),
            lambda x, v: v.pow(-0.5) * x,
            lambda x, v: torch.mul(x, 1 / torch.sqrt(v)),
        ]
    )
    factors = choose.choice(["none", "weight", "both", "one plus"])
    wide = choose.random() < 0.5

    def function(m: Formula, x: T) -> T:
        dtype, x = x.dtype, x.float() if wide else x
        other = x.exp() if fault == "another tensor" else x
        y = over(x - mean(x), spread(other) + EPS)
        if fault == "not the mean":
            y = over(x - 2 * mean(x), spread(other) + EPS)
        if factors != "none":
            y = y * (1.0 + m.w if factors == "one plus" else m.w)
        if factors in ("both", "one plus"):
            y = m.b + y
        return y.to(dtype)

    return function


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_spelling_is_found_and_computes_the_same(choose: random.Random) -> None:
    pair = norm(Formula(spelled(choose), WIDTH), rows(WIDTH))
    assert pair.reasons == [] and [s.rule for s in pair.done] == ["layer_norm"]
    assert max(differences(pair, rows(WIDTH))) < 2e-6


@settings(max_examples=25, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from(["correction", "another tensor", "not the mean"]),
)
def test_no_spelling_of_something_else_is(choose: random.Random, fault: str) -> None:
    pair = norm(Formula(spelled(choose, fault), WIDTH), rows(WIDTH))
    assert pair.done == [] and "layer_norm" in {s.rule for s in pair.sites}
