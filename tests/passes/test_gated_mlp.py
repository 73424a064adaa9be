"""The gated MLP rule: whole modules, packed layers, the product alone, and why it refuses."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liger_fx.passes.gated_mlp import GatedMLP
from tests.engine.graphs import Around, Formula, Rewritten, differences, rewritten, rows

T = torch.Tensor
WIDTH, INNER = 8, 12


def erf_gelu(x: T) -> T:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def new_gelu(x: T) -> T:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def fast_gelu(x: T) -> T:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


ACTIVATIONS = {
    "silu": [F.silu, lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x, nn.SiLU()],
    "gelu": [F.gelu, erf_gelu, nn.GELU()],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh"), new_gelu, fast_gelu, nn.GELU("tanh")],
    "relu": [F.relu, torch.relu, nn.ReLU()],
}
NAMES = {"silu": "SwiGLU", "gelu": "GEGLU", "gelu_tanh": "GEGLU", "relu": "ReGLU"}


class Separate(nn.Module):
    def __init__(self, act: Any = F.silu) -> None:
        super().__init__()
        self.act = act
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.gate_proj = nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: T) -> T:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Packed(nn.Module):
    """The first half is the gate."""

    def __init__(self, act: Any = F.silu) -> None:
        super().__init__()
        self.act = act
        self.gate_up_proj = nn.Linear(WIDTH, 2 * INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: T) -> T:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act(gate))


class UpFirst(Packed):
    def forward(self, x: T) -> T:
        both = self.gate_up_proj(x)
        return self.down_proj(self.act(both[..., INNER:]) * both[..., :INNER])


def mlp(module: nn.Module, *inputs: T) -> Rewritten:
    return rewritten([GatedMLP()], module, *(inputs or (rows(WIDTH),)))


@pytest.mark.parametrize("kind", [Separate, Packed, UpFirst])
@pytest.mark.parametrize(("name", "act"), [(n, a) for n, acts in ACTIVATIONS.items() for a in acts])
def test_a_module_is_replaced_whole(kind: Any, name: str, act: Any) -> None:
    module = Around(kind(act))
    pair = mlp(module)
    assert pair.code == "sin = x.sin()\ninner = self.inner(sin)\ncos = inner.cos()"
    inner = pair.traced.root.inner
    assert type(inner).__name__ == f"Liger{NAMES[name]}MLP" and inner.activation == name
    layers = [child for child, _ in module.inner.named_children() if child.endswith("proj")]
    assert [child for child, _ in inner.named_children()] == layers
    assert max(differences(pair, rows(WIDTH))) < 3e-6


@pytest.mark.parametrize("kind", [Separate, Packed, UpFirst])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_computes_the_same_in_other_dtypes(kind: Any, dtype: torch.dtype) -> None:
    x = rows(WIDTH, dtype)
    pair = mlp(Around(kind(F.silu)).to(dtype), x)
    assert pair.done and max(differences(pair, x)) < (1e-13 if dtype is torch.float64 else 0.03)


def test_the_layers_are_the_original_objects_under_their_names() -> None:
    module = Around(Packed())
    from liger_fx.engine.rewriter import rewrite
    from tests.engine.graphs import trace

    layer = module.inner.gate_up_proj
    rewrite(trace(module, rows(WIDTH)), [GatedMLP()])
    assert module.inner.gate_up_proj is layer
    assert module.inner.extra_repr() == "8 -> 12, activation=silu, packed"


def test_a_linear_layer_of_another_make_is_one_too() -> None:
    class QuantLinear(nn.Linear):
        def forward(self, x: T) -> T:
            return F.linear(x, self.weight.round(decimals=1), self.bias)

    module = Separate()
    module.gate_proj = QuantLinear(WIDTH, INNER)
    pair = mlp(Around(module))
    assert type(pair.traced.root.inner).__name__ == "LigerSwiGLUMLP"
    assert type(pair.traced.root.inner.gate_proj) is QuantLinear
    assert max(differences(pair, rows(WIDTH))) < 1e-6


# -- the product alone ---------------------------------------------------------


def in_a_layer(m: Formula, x: T) -> T:
    return x + m.down(F.silu(m.gate(x)) * m.up(x))


def layer() -> Formula:
    module = Formula(in_a_layer)
    module.gate, module.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
    module.down = nn.Linear(INNER, WIDTH)
    return module


def test_between_layers_of_a_larger_module_the_product_becomes_a_module() -> None:
    pair = mlp(layer())
    assert pair.code.split("\n")[:4] == [
        "gate = self.gate(x)",
        "up = self.up(x)",
        "swiglu = self.swiglu(gate, up)",
        "down = self.down(swiglu)",
    ]
    assert pair.traced.root.swiglu.extra_repr() == "12, activation=silu"
    assert max(differences(pair, rows(WIDTH))) < 1e-6


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_the_product_of_the_halves_of_one_tensor(name: str, gate_first: bool) -> None:
    def function(m: Formula, x: T) -> T:
        first, second = (x * 2).chunk(2, dim=-1)
        gate, up = (first, second) if gate_first else (second, first)
        return (ACTIVATIONS[name][0](gate) * up).exp()

    pair = mlp(Formula(function))
    assert pair.called() == [f"Liger{NAMES[name]}"]
    assert f"(mul)" in pair.code and "chunk" not in pair.code  # noqa: F541
    assert max(differences(pair, rows(WIDTH))) < 1e-6


def test_a_module_that_is_the_product_and_nothing_else_gives_its_place() -> None:
    class SwiGLU(nn.Module):
        def forward(self, x: T) -> T:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up

    pair = mlp(Around(SwiGLU()))
    assert type(pair.traced.root.inner).__name__ == "LigerSwiGLU"
    assert pair.done[0].path == "inner" and max(differences(pair, rows(WIDTH))) < 1e-6


def test_a_product_in_float32_takes_the_upcast_tensors() -> None:
    def function(m: Formula, x: T) -> T:
        return F.silu(x.float()) * (x * 2).float()

    x = rows(WIDTH, torch.bfloat16)
    pair = mlp(Formula(function), x)
    assert pair.called() == ["LigerSwiGLU"] and pair.code.count(".float()") == 2
    assert max(differences(pair, x)) < 0.01


def test_a_module_that_casts_on_its_way_is_not_replaced_whole() -> None:
    class Casts(Separate):
        def forward(self, x: T) -> T:
            product = self.act(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(product.to(self.down_proj.weight.dtype))

    module, x = Around(Casts().to(torch.bfloat16)), rows(WIDTH, torch.bfloat16)
    module.inner.down_proj.float()
    pair = mlp(module, x)
    assert pair.called() == ["Linear", "Linear", "LigerSwiGLU", "Linear"]
    assert max(differences(pair, x)) < 0.02
    assert mlp(Around(Casts())).called() == ["LigerSwiGLUMLP"]


class HasDropout(Separate):
    """A module that drops while it trains is no plain MLP, in eval mode either."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, x: T) -> T:
        return self.down_proj(self.drop(self.act(self.gate_proj(x)) * self.up_proj(x)))


class NoModuleOfItsOwn(Separate):
    """The weights of a layer are used without calling it."""

    def forward(self, x: T) -> T:
        gate = F.linear(x, self.gate_proj.weight, self.gate_proj.bias)
        return self.down_proj(self.act(gate) * self.up_proj(x))


class OneLayerTwice(Separate):
    def forward(self, x: T) -> T:
        return self.down_proj(self.act(self.gate_proj(x)) * self.gate_proj(x)) + 0 * x


class OneGateForAll(Separate):
    """A gate of width one, broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 1)


class OtherInputs(Separate):
    def forward(self, x: T) -> T:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x.flip(1)))


@pytest.mark.parametrize(
    "module", [HasDropout(0.1).eval(), NoModuleOfItsOwn(), OneLayerTwice(), OtherInputs()]
)
def test_what_is_no_whole_mlp_keeps_its_layers(module: nn.Module) -> None:
    pair = mlp(Around(module).train(module.training))
    assert pair.called().count("LigerSwiGLU") == 1 and pair.called().count("Linear") >= 2
    assert max(differences(pair, rows(WIDTH))) < 1e-6


def test_a_gate_of_another_width_is_told_of() -> None:
    pair = mlp(Around(OneGateForAll()))
    assert pair.called() == ["Linear"] * 3
    assert pair.reasons[0].startswith("gate, up and product are not alike: float32[")
    assert max(differences(pair, rows(WIDTH))) == 0


def test_a_product_with_a_size_is_no_product_with_a_tensor() -> None:
    assert mlp(Formula(lambda m, x: F.silu(x) * x.shape[0])).called() == []


def test_a_dropout_that_never_drops_does_not_matter() -> None:
    assert mlp(Around(HasDropout(0.0))).called() == ["LigerSwiGLUMLP"]


# -- why it refuses ------------------------------------------------------------


def gate_is_read_too(m: Formula, x: T) -> T:
    gate = F.silu(m.w * x)
    return gate * x.cos() + gate


def other_shapes(m: Formula, x: T) -> T:
    return F.silu(x) * m.w


def other_dtypes(m: Formula, x: T) -> T:
    return F.silu(x.to(torch.bfloat16)) * x


def in_place(m: Formula, x: T) -> T:
    up = x.cos()
    gate = F.silu(x)
    up.add_(1)
    return gate * up * 1


def gate_is_seen_before(m: Formula, x: T) -> T:
    gate = x + x.sin()
    first = gate[..., :1]
    return F.silu(gate, inplace=True) * x.cos() + first


def half_in_place(m: Formula, x: T) -> T:
    both = x + 1
    gate, up = both[..., : WIDTH // 2], both[..., WIDTH // 2 :]
    return F.relu(gate, inplace=True) * up


REASONS = {
    gate_is_seen_before: "it works in place on what add[..., :1] reads as well (silu(add, True) at",
    half_in_place: "it works in place on what may be a part of something else (relu(",
    gate_is_read_too: "an inner result is also read by add(",
    other_shapes: "gate, up and product are not alike: float32",
    other_dtypes: "gate, up and product are not alike: bfloat16",
}


@pytest.mark.parametrize("function", REASONS)
def test_what_cannot_be_replaced_stays_and_the_reason_says_why(function: Any) -> None:
    pair = mlp(Formula(function))
    assert pair.called() == [] and len(pair.reasons) == 1
    assert pair.reasons[0].startswith(REASONS[function])
    assert max(differences(pair, rows(WIDTH))) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.sigmoid(x) * x.cos(),
        lambda m, x: F.mish(x) * x.cos(),
        lambda m, x: F.silu(x) + x.cos(),
        lambda m, x: x * torch.sigmoid(1.7 * x) * x.cos(),
        lambda m, x: F.relu(x).pow(3) * x.cos(),
        lambda m, x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3))) * x.cos(),
        lambda m, x: 0.5 * x * (1.0 + torch.erf(x / 1.4)) * x.cos(),
        lambda m, x: 0.5 * x * (1.0 - torch.erf(x / math.sqrt(2.0))) * x.cos(),
        lambda m, x: x.cos() * F.silu(x).clamp(max=1.0),
    ],
)
def test_other_activations_are_no_candidates(function: Any) -> None:
    assert mlp(Formula(function)).sites == []


def test_a_class_of_that_name_that_computes_something_else() -> None:
    class OddMLP(Separate):
        def forward(self, x: T) -> T:
            return self.down_proj(self.gate_proj(x) * self.up_proj(x))

    assert mlp(Around(OddMLP())).reasons == ["no gated_mlp was found in it"]


# -- random spellings ----------------------------------------------------------


def spelled(choose: random.Random, fault: str | None = None) -> nn.Module:
    """A gated MLP with a random activation, order and packing, with one fault or none."""
    name = choose.choice(sorted(ACTIVATIONS))
    act = choose.choice(ACTIVATIONS[name])
    product = choose.choice([torch.mul, lambda a, b: a * b, lambda a, b: b.mul(a)])
    packed, up_first = choose.random() < 0.5, choose.random() < 0.5
    halves = choose.choice([lambda b: b.chunk(2, -1), lambda b: b.split(INNER, dim=-1)])

    class Spelled(Packed if packed else Separate):  # type: ignore[misc]
        def forward(self, x: T) -> T:
            if packed:
                gate, up = halves(self.gate_up_proj(x))
                gate, up = (up, gate) if up_first else (gate, up)
            else:
                gate, up = self.gate_proj(x), self.up_proj(x)
            if fault == "squashed":
                gate = gate.tanh()
            if fault == "scaled":
                up = up * 2
            if fault == "gate twice":
                up = gate
            return self.down_proj(product(act(gate), up))

    return Spelled(act)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_spelling_is_found_and_computes_the_same(choose: random.Random) -> None:
    pair = mlp(Around(spelled(choose)))
    assert pair.reasons == [] and pair.called()[0].endswith("MLP")
    assert max(differences(pair, rows(WIDTH))) < 3e-6


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["squashed", "scaled", "gate twice"]))
def test_no_spelling_of_something_else_is_a_whole_mlp(choose: random.Random, fault: str) -> None:
    pair = mlp(Around(spelled(choose, fault)))
    assert not any(name.endswith("MLP") for name in pair.called())
    assert "Linear" in pair.called() and max(differences(pair, rows(WIDTH))) < 3e-6
