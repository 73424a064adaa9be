"""The sigmoid gate: what it finds, that silu is none, and why it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.engine.rule import discover
from liger_fx.passes.sigmoid_gate import SigmoidGate
from tests.engine.graphs import Around, Formula, Rewritten, differences, rewritten, rows

T = torch.Tensor
WIDTH = 8


def gated(module: nn.Module, *inputs: T) -> Rewritten:
    return rewritten([SigmoidGate()], module, *(inputs or (rows(WIDTH),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.cos() * torch.sigmoid(x.sin()),
        lambda m, x: F.sigmoid(x.sin()) * x.cos(),
        lambda m, x: x.cos() * (x + 1).sigmoid_(),
    ],
)
def test_a_gate_is_replaced(function: Any, dtype: torch.dtype) -> None:
    x = rows(WIDTH, dtype)
    pair = gated(Formula(function), x)
    assert pair.called() == ["LigerSigmoidGate"]
    assert pair.traced.root.sigmoid_gate.extra_repr() == "8, activation=sigmoid"
    bound = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 0.02}[dtype]
    assert max(differences(pair, x)) < bound


REASONS = {
    (lambda m, x: x * torch.sigmoid(x[..., :1])): "gate, input and product are not alike",
    (lambda m, x: x.double() * torch.sigmoid(x.sin())): "the dtype changes on the way (double(x)",
    (lambda m, x: x * torch.sigmoid(x.sin().double())): "the dtype changes on the way (double(sin)",
    (lambda m, x: (s := torch.sigmoid(x.sin())) * x + s): "an inner result is also read by add(",
}


@pytest.mark.parametrize("function", REASONS)
def test_what_cannot_be_replaced_stays_and_the_reason_says_why(function: Any) -> None:
    pair = gated(Formula(function))
    assert pair.called() == [] and len(pair.reasons) == 1
    assert pair.reasons[0].startswith(REASONS[function])
    assert max(differences(pair, rows(WIDTH))) == 0


class SiluMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: T) -> T:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(h))


def test_the_silu_of_an_mlp_is_no_gate() -> None:
    pair = rewritten(discover(), Around(SiluMLP()), rows(WIDTH))
    assert [type(pair.traced.root.inner).__name__] == ["LigerMLP"]
    assert not [site for site in pair.sites if site.rule == "sigmoid_gate"]


def swapped(x: T) -> T:
    return x.transpose(1, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: swapped(x.cos()) * torch.sigmoid(swapped(x.sin())),
        lambda m, x: x.cos() * torch.sigmoid(swapped(swapped(x.sin()).contiguous())),
        lambda m, x: x.cos()[..., ::2] * torch.sigmoid(x.sin()[..., ::2]),
        lambda m, x: x.cos() * torch.sigmoid(x.sin()),
    ],
)
def test_the_product_lies_in_memory_as_it_did(function: Any) -> None:
    x = rows(WIDTH)
    pair = gated(Formula(function), x)
    assert pair.called() == ["LigerSigmoidGate"]
    found, wanted = pair.traced.root(x), function(None, x)
    torch.testing.assert_close(found, wanted)
    assert found.stride() == wanted.stride()
