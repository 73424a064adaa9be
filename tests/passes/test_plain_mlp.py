"""The plain MLP rule: two linear layers with an activation between, and why it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import QuickGELUActivation, ReLUSquaredActivation

from liger_fx.engine.rule import discover
from liger_fx.passes.gated_mlp import GatedMLP
from liger_fx.passes.plain_mlp import PlainMLP
from tests.engine.graphs import Around, Rewritten, differences, rewritten, rows

T = torch.Tensor
WIDTH, INNER = 8, 12


class MLP(nn.Module):
    def __init__(self, act: Any = F.gelu) -> None:
        super().__init__()
        self.act = act
        self.c_proj = nn.Linear(INNER, WIDTH)
        self.c_fc = nn.Linear(WIDTH, INNER)

    def forward(self, x: T) -> T:
        return self.c_proj(self.act(self.c_fc(x)))


def mlp(module: nn.Module, *inputs: T) -> Rewritten:
    return rewritten([PlainMLP()], module, *(inputs or (rows(WIDTH),)))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (F.gelu, "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (torch.relu, "relu"),
        (F.silu, "silu"),
        (lambda x: x * x.sigmoid(), "silu"),
        (QuickGELUActivation(), "quick_gelu"),
        (ReLUSquaredActivation(), "relu_squared"),
        (lambda x: F.relu(x).square(), "relu_squared"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_module_is_replaced_whole(act: Any, name: str, dtype: torch.dtype) -> None:
    x = rows(WIDTH, dtype)
    pair = mlp(Around(MLP(act)).to(dtype), x)
    assert pair.code == "sin = x.sin()\ninner = self.inner(sin)\ncos = inner.cos()"
    inner = pair.traced.root.inner
    assert inner.extra_repr() == f"8 -> 12, activation={name}"
    assert [child for child, _ in inner.named_children()] == ["c_proj", "c_fc"]
    bound = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 0.03}[dtype]
    assert max(differences(pair, x)) < bound


def test_a_dropout_that_never_drops_is_no_hindrance() -> None:
    module = nn.Sequential(
        nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Dropout(0.0), nn.Linear(INNER, WIDTH)
    )
    assert mlp(Around(module)).called() == ["LigerMLP"]


def test_a_gated_mlp_is_no_plain_one() -> None:
    class Gated(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, INNER)

        def forward(self, x: T) -> T:
            return self.c_proj(self.act(self.c_fc(x)) * self.up(x))

    assert mlp(Around(Gated())).sites == []
    pair = rewritten(discover(), Around(Gated()), rows(WIDTH))
    assert [site.after_class for site in pair.sites] == ["LigerGEGLUMLP"]


# -- why it refuses ------------------------------------------------------------


class Layer(nn.Module):
    """BERT's way: one linear layer in each of two modules."""

    class Intermediate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(WIDTH, INNER)

        def forward(self, x: T) -> T:
            return F.gelu(self.dense(x))

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(INNER, WIDTH)

        def forward(self, x: T) -> T:
            return self.dense(x).cos()

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = self.Intermediate(), self.Output()

    def forward(self, x: T) -> T:
        return self.output(self.intermediate(x))


class Drops(MLP):
    def forward(self, x: T) -> T:
        return self.c_proj(F.dropout(self.act(self.c_fc(x)), 0.1, False))


class GoesOn(MLP):
    def forward(self, x: T) -> T:
        return self.c_proj(self.act(self.c_fc(x))) + x


class InnerIsReadToo(MLP):
    def forward(self, x: T) -> T:
        inner = self.act(self.c_fc(x))
        return self.c_proj(inner) * inner.mean()


class Casts(MLP):
    def forward(self, x: T) -> T:
        return self.c_proj(self.act(self.c_fc(x)).to(self.c_proj.weight.dtype))


class WithoutTheModule(MLP):
    def forward(self, x: T) -> T:
        return F.linear(self.act(self.c_fc(x)), self.c_proj.weight)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: T) -> T:
        return self.square(F.relu(self.square(x)))


class InTheTree(nn.Module):
    """The layers stand further in than the module that computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: T) -> T:
        return self.layers[1](F.relu(self.layers[0](x)))


REASONS = {
    "the two linear layers sit in different modules, inner.intermediate and": Layer(),
    "wanted any activation, found dropout(": Drops(),
    "GoesOn goes on after it (add(": GoesOn(),
    "an inner result is also read by mean(": InnerIsReadToo(),
    "a linear layer is a call of F.linear, not a module (": WithoutTheModule(),
    "one linear layer has two roles (square(": OneLayer(),
    "inner.layers.0 is not the module's own": InTheTree(),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_no_module_of_its_own_stays_and_the_reason_says_why(reason: str) -> None:
    pair = mlp(Around(REASONS[reason]))
    assert "LigerMLP" not in pair.called() and len(pair.sites) == 1
    assert pair.reasons[0].startswith(reason), pair.reasons
    assert max(differences(pair, rows(WIDTH))) == 0


def test_a_cast_between_the_layers() -> None:
    module = Around(Casts()).to(torch.bfloat16)
    module.inner.c_proj.float()
    (reason,) = mlp(module, rows(WIDTH, torch.bfloat16)).reasons
    assert reason.startswith("the dtype changes on the way (to(gelu")


@pytest.mark.parametrize(
    "act", [torch.tanh, lambda x: x * torch.sigmoid(1.6 * x), lambda x: F.relu(x).pow(3)]
)
def test_an_unknown_activation_is_told_of_by_the_name_of_the_class(act: Any) -> None:
    assert mlp(Around(MLP(act))).reasons == ["no plain_mlp was found in it"]
    reasons = rewritten([GatedMLP(), PlainMLP()], Around(MLP(act)), rows(WIDTH)).reasons
    assert reasons == ["no gated_mlp or plain_mlp was found in it"]
