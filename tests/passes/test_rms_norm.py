"""The RMSNorm rule: what it finds, what it puts there, what it computes, and why it refuses."""

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

from liger_fx.modules import LigerRMSNorm
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

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(width))


class Llama(Norm):
    def forward(self, x: T) -> T:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return self.scale * x.to(dtype)


class Gemma(Norm):
    def forward(self, x: T) -> T:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * (1.0 + self.scale.float())).type_as(x)


class Gemma4(Norm):
    def forward(self, x: T) -> T:
        wide = x.float()
        wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5)
        return (wide * self.scale.float()).type_as(x)


class Afmoe(Norm):
    def forward(self, x: T) -> T:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (self.scale * wide).to(x.dtype)


class DeepseekV4(nn.Module):
    def forward(self, x: T) -> T:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype)


class Functional(Norm):
    def forward(self, x: T) -> T:
        return F.rms_norm(x, (WIDTH,), self.scale, EPS)


MODULES = {
    Llama: "(12,), eps=0.0003, cast=promote",
    Gemma: "(12,), eps=0.0003, scale=1 + weight",
    Gemma4: "(12,), eps=0.0003",
    Afmoe: "(12,), eps=0.0003",
    DeepseekV4: "(12,), eps=0.0003",
    Functional: "(12,), eps=0.0003, cast=promote",
}


def norm(module: nn.Module, *inputs: T) -> Rewritten:
    return rewritten([RMSNorm()], module, *(inputs or (rows(WIDTH),)))


@pytest.mark.parametrize("kind", MODULES)
def test_a_norm_module_is_replaced_by_its_named_one(kind: type[nn.Module]) -> None:
    pair = norm(Around(kind()))
    assert len(pair.done) == 1 and pair.reasons == []
    assert pair.code == "sin = x.sin()\ninner = self.inner(sin)\ncos = inner.cos()"
    module = pair.traced.root.inner
    assert isinstance(module, LigerRMSNorm) and module.extra_repr() == MODULES[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MODULES)
def test_it_computes_the_same(kind: type[nn.Module], dtype: torch.dtype) -> None:
    if dtype is torch.float64 and kind is not Functional:
        pytest.skip("the model's own code goes down to float32")
    x = rows(WIDTH, dtype)
    pair = norm(Around(kind()).to(dtype), x)
    bound = 1e-6 if dtype is torch.float32 else 1e-13
    assert pair.done and max(differences(pair, x)) < bound


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODULES)
def test_in_mixed_dtypes_the_result_has_the_dtype_the_model_gives_it(
    kind: type[nn.Module], x: torch.dtype, weight: torch.dtype
) -> None:
    inputs = rows(WIDTH, x)
    pair = norm(Around(kind()).to(weight), inputs)
    assert pair.done, pair.reasons
    assert max(differences(pair, inputs)) < 0.02  # and equal dtypes, which differences() asserts


def test_a_weight_of_another_module_is_an_argument() -> None:
    def function(m: Formula, x: T) -> T:
        return (m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))).exp()

    pair = norm(Formula(function), rows())
    assert "rms_norm = self.rms_norm(x, w)" in pair.code
    assert max(differences(pair, rows())) < 1e-6


def test_two_norms_in_one_module_with_two_eps_are_two_modules() -> None:
    def function(m: Formula, x: T) -> T:
        x = m.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return m.b * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * EPS)

    pair = norm(Formula(function), rows())
    targets = [n.target for n in pair.traced.graph.nodes if n.op == "call_module"]
    assert targets == ["rms_norm", "rms_norm_2"]
    assert max(differences(pair, rows())) < 1e-6


def test_torchs_own_norm_is_replaced_with_its_parameter() -> None:
    for options in ({"eps": EPS}, {"elementwise_affine": False}, {}):
        model = nn.Sequential(nn.RMSNorm(WIDTH, **options))
        pair = norm(model)
        assert isinstance(pair.traced.root[0], LigerRMSNorm) and pair.done[0].path == "0"
        assert max(differences(pair, rows(WIDTH))) < 1e-6


def test_torchs_own_norm_of_an_upcast_tensor_keeps_its_weight() -> None:
    class Upcasts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(WIDTH, eps=EPS)
            nn.init.normal_(self.norm.weight)

        def forward(self, x: T) -> T:
            return self.norm(x.cos().float()).cos()

    for dtype in (torch.float32, torch.bfloat16):
        pair = norm(Upcasts(), rows(WIDTH, dtype))
        assert pair.done[0].path == "norm" and list(pair.after.state_dict()) == ["norm.weight"]
        assert max(differences(pair, rows(WIDTH, dtype))) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_own_norm_without_eps_in_a_short_dtype(dtype: torch.dtype) -> None:
    """Small rows, whose result the eps decides."""
    model, x = nn.Sequential(nn.RMSNorm(WIDTH)).to(dtype), rows(WIDTH, dtype) * 0.01
    pair = norm(model, x)
    assert pair.done and max(differences(pair, x)) < 0.02


def test_a_weight_that_is_no_parameter_of_the_module_is_an_argument() -> None:
    class Buffered(Norm):
        def __init__(self) -> None:
            super().__init__()
            weight = self.scale.detach()
            del self.scale
            self.register_buffer("scale", weight)

        def forward(self, x: T) -> T:
            return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    class Computed(Norm):
        def forward(self, x: T) -> T:
            return self.scale.exp() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    for kind in (Buffered, Computed):
        pair = norm(Around(kind()))
        assert "rms_norm = self.inner.rms_norm(sin, " in pair.code
        assert list(pair.after.state_dict()) == ["inner.scale"]
        assert max(differences(pair, rows(WIDTH))) < 1e-6


class StaysInFloat32(Norm):
    def forward(self, x: T) -> T:
        x = x.float()
        return self.scale.float() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_whose_result_stays_in_float32_keeps_its_place(dtype: torch.dtype) -> None:
    """Its module would be called again, in another dtype, as it was made in this one."""
    pair = norm(Around(StaysInFloat32()).to(dtype), rows(WIDTH, dtype))
    assert type(pair.traced.root.inner).__name__ == "StaysInFloat32"
    assert pair.called() == ["LigerRMSNorm"]
    assert max(differences(pair, rows(WIDTH, dtype))) < 0.01


def test_per_head_on_a_view() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm = Llama(6)

        def forward(self, x: T) -> T:
            return self.q_norm(x.view(*x.shape[:2], 2, 6)).transpose(1, 2)

    pair = norm(Heads())
    assert pair.done[0].path == "q_norm" and max(differences(pair, rows(WIDTH))) < 1e-6


# -- why it refuses ------------------------------------------------------------


class NotOne(Norm):
    """What a subclass computes is not an RMSNorm."""

    def root(self, x: T) -> T:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


class LayerNorm(NotOne):
    def forward(self, x: T) -> T:
        x = x - x.mean(-1, keepdim=True)
        return self.scale * (x * self.root(x))


class Cohere(NotOne):
    """The difference is taken twice."""

    def forward(self, x: T) -> T:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.scale * ((x - mean) * torch.rsqrt(variance + EPS))


class Sum(NotOne):
    def forward(self, x: T) -> T:
        return self.scale * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


class WrongDim(NotOne):
    def forward(self, x: T) -> T:
        return self.scale * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)


class OtherTensor(NotOne):
    def forward(self, x: T) -> T:
        return self.scale * x * self.root(x.exp())


class EpsOutside(NotOne):
    def forward(self, x: T) -> T:
        return self.scale * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS))


class EpsOfTheModel(NotOne):
    def forward(self, x: T) -> T:
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.scale.abs())


class Cubes(NotOne):
    def forward(self, x: T) -> T:
        return self.scale * x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS)


class Clamped(NotOne):
    def forward(self, x: T) -> T:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=EPS))


class RootIsReadToo(NotOne):
    def forward(self, x: T) -> T:
        root = self.root(x)
        return x * root * self.scale + root


class ChangedInBetween(NotOne):
    def forward(self, x: T) -> T:
        x = x.exp()
        root = self.root(x)
        x.add_(1)
        return x * root


REASONS = {
    LayerNorm: "it subtracts the mean first: a LayerNorm, not an RMSNorm (sub(sin, mean) at",
    Cohere: "it subtracts the mean first: a LayerNorm, not an RMSNorm (sub(sin, mean) at",
    Sum: "wanted mean(square(x)), found sum(pow_1, -1, True) at test_rms_norm.py:",
    WrongDim: "dims is (-2,), not (-1,), in mean(pow_1, 1, True) at",
    OtherTensor: "wanted x (exp(sin)) again, found ",
    EpsOutside: "wanted x * rsqrt(mean(square(x)) + the number eps) * ",
    EpsOfTheModel: "wanted the number eps, found abs(scale) at",
    Cubes: "wanted square(x), found pow(sin, 4) at",
    Clamped: "wanted mean(square(x)) + the number eps, found clamp(mean, ",
    RootIsReadToo: "an inner result is also read by add(mul_1, rsqrt) (rsqrt(add) at",
    ChangedInBetween: "wanted x * (the number offset + weight), found add_(exp, 1) at",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_no_norm_stays_and_the_reason_says_why(kind: type[nn.Module]) -> None:
    pair = norm(Around(kind()))
    assert pair.done == [] and len(pair.sites) == 1
    assert pair.reasons[0].startswith(REASONS[kind])
    assert torch.equal(pair.before(rows(WIDTH)), pair.after(rows(WIDTH)))


def test_a_weight_that_comes_in_after_a_lossy_cast_stays_outside() -> None:
    class Shortened(Norm):
        def forward(self, x: T) -> T:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
            return self.scale * y.to(torch.bfloat16)

    pair = norm(Around(Shortened()).to(torch.bfloat16), rows(WIDTH))
    assert pair.called() == ["LigerRMSNorm"]
    assert "to = inner_rms_norm.to(torch.bfloat16)" in pair.code
    assert max(differences(pair, rows(WIDTH))) < 0.01


def test_a_weight_that_is_no_row_leaves_the_norm_without_it() -> None:
    class HeadWeights(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(TOKENS, WIDTH))

        def forward(self, x: T) -> T:
            return self.scale * x.div(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    pair = norm(Around(HeadWeights()))
    assert pair.called() == ["LigerRMSNorm"]
    assert "mul = inner_scale.mul(inner_rms_norm)" in pair.code
    assert max(differences(pair, rows(WIDTH))) < 1e-6


def test_a_row_of_a_width_that_varies() -> None:
    pair = norm(Formula(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))), rows(BATCH))
    (reason,) = pair.reasons
    assert reason.startswith("the width of its rows is not fixed")


def test_a_layer_norm_of_torch_is_no_candidate() -> None:
    assert norm(nn.Sequential(nn.LayerNorm(WIDTH))).sites == []


def test_a_norm_of_torch_whose_weight_is_computed_stays() -> None:
    class Twice(nn.Module):
        def forward(self, weight: T) -> T:
            return 2 * weight

    module = nn.Sequential(nn.RMSNorm(WIDTH))
    parametrize.register_parametrization(module[0], "weight", Twice())
    (reason,) = norm(module).reasons
    assert reason.startswith("it is a ParametrizedRMSNorm, not a plain RMSNorm")


def test_a_class_of_that_name_that_computes_something_else() -> None:
    class OddRMSNorm(Norm):
        def forward(self, x: T) -> T:
            return self.scale * F.normalize(x, dim=-1)

    assert norm(nn.Sequential(OddRMSNorm())).reasons == ["no rms_norm was found in it"]


# -- random spellings ------------------------------------------------------------


def spelled(choose: random.Random, fault: str | None = None) -> Any:
    """x * weight / root-mean-square(x) in a random spelling, with one fault or none."""
    square = choose.choice([lambda x: x * x, lambda x: x.pow(2), torch.square, lambda x: x**2])
    mean = choose.choice(
        [
            lambda s: s.mean(-1, keepdim=True),
            lambda s: torch.mean(s, dim=2, keepdim=True),
            lambda s: s.mean(-1).unsqueeze(-1),
            lambda s: s.sum(-1, keepdim=True) / WIDTH,
        ]
    )
    if fault == "sum":
        mean = lambda s: s.sum(-1, keepdim=True)  # noqa: E731
    if fault == "axis":
        mean = lambda s: s.mean(1, keepdim=True)  # noqa: E731
    plus = choose.choice([lambda v: v + EPS, lambda v: EPS + v, lambda v: v.add(EPS)])
    over = choose.choice(
        [
            lambda x, v: x * torch.rsqrt(v),
            lambda x, v: x / v.sqrt(),
            lambda x, v: v.pow(-0.5) * x,
            lambda x, v: torch.mul(x, 1 / torch.sqrt(v)),
            lambda x, v: v.sqrt().reciprocal() * x,
            lambda x, v: x / v**0.5,
        ]
    )
    wide, weight_first = choose.random() < 0.5, choose.random() < 0.5
    offset = choose.choice([0.0, 1.0])

    def function(m: Formula, x: T) -> T:
        dtype, x = x.dtype, x.float() if wide else x
        other = x.exp() if fault == "another tensor" else x
        variance = mean(square(other))
        root = variance if fault == "eps outside" else plus(variance)
        weight = offset + m.w if offset else m.w
        y = over(x * weight, root) if weight_first else weight * over(x, root)
        return y.to(dtype) if fault != "eps outside" else plus(y)

    return function


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_spelling_is_found_and_computes_the_same(choose: random.Random) -> None:
    pair = norm(Formula(spelled(choose), WIDTH), rows(WIDTH))
    assert pair.reasons == [] and len(pair.done) == 1
    assert max(differences(pair, rows(WIDTH))) < 2e-6


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["sum", "axis", "another tensor"]))
def test_no_spelling_of_something_else_is(choose: random.Random, fault: str) -> None:
    pair = norm(Formula(spelled(choose, fault), WIDTH), rows(WIDTH))
    assert pair.done == [] and len(pair.reasons) == 1


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_an_eps_outside_the_norm_is_no_eps_of_it(choose: random.Random) -> None:
    pair = norm(Formula(spelled(choose, "eps outside"), WIDTH), rows(WIDTH))
    assert all("eps=0.0" in m.extra_repr() for m in pair.after.modules() if type(m) is LigerRMSNorm)
    assert max(differences(pair, rows(WIDTH))) < 2e-6
