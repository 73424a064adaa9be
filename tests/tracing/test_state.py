"""A trace runs the model's code, and leaves no trace of that on the model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import liger_fx
from liger_fx.errors import FallbackWarning, TraceError
from tests.support.families import build, make_inputs
from tests.support.untouched import Untouched

X = torch.randn(2, 5, 16)


def fakes_of(model: nn.Module) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if isinstance(tensor, FakeTensor)]


def test_an_offloaded_model_is_refused_and_runs_on() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = Untouched(model)
    with pytest.raises(TraceError, match="remove_hook_from_submodules"):
        liger_fx.optimize(model)
    assert before.changes() == [] and fakes_of(model) == []
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_an_optimised_model_is_offloaded_afterwards() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = model(**inputs).logits
    accelerate.cpu_offload(opt, execution_device=torch.device("cpu"))
    with torch.no_grad(), pytest.warns(FallbackWarning, match="accelerate"):
        result = opt(**inputs).logits
    assert torch.allclose(result, expected, atol=1e-5)
    assert fakes_of(opt) == [] and fakes_of(model) == []
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


class ReplacesWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = nn.Parameter(self.linear.weight.detach() * 1.0)
        self.linear._parameters["weight"] = weight
        return self.linear(x)


class ReachesOut(nn.Module):
    """Holds a function that leads to another model: to the one it was copied from."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.children_of_mine = [self.remember]

    def remember(self, x: torch.Tensor) -> None:
        self.linear._parameters["seen"] = nn.Parameter(x.detach())
        self.last = x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.children_of_mine[0](x)
        return self.linear(x)


@pytest.mark.parametrize("make", [ReplacesWeight, ReachesOut])
def test_no_fake_parameter_stays(make: type[nn.Module]) -> None:
    model = make()
    before = Untouched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opt: Any = liger_fx.optimize(model, inputs=(X,))
        except TraceError:
            opt = None
    assert before.changes() == [] and fakes_of(model) == []
    assert opt is None or fakes_of(opt) == []
    assert model(X).shape == X.shape


def test_a_lazy_layer_is_refused_before_its_first_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyLinear(4))
    with pytest.raises(TraceError, match="a batch first"):
        liger_fx.trace(model, inputs=(X,))
    assert model(X).shape == (2, 5, 4)
    assert torch.equal(liger_fx.trace(model, inputs=(X,))(X), model(X))


class Table(nn.Module):
    """Keeps a table that grows with the longest input, and what it was last made for."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None
        self.length = 0
        self.made: dict[str, list[int]] = {"lengths": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or x.shape[1] > self.length:
            self.length = int(x.shape[1])
            self.made["lengths"].append(self.length)
            self.table = torch.arange(self.length, dtype=x.dtype).cos()[:, None]
        return x * self.table[: x.shape[1]]


def test_a_trace_leaves_no_state_behind() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Table())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = liger_fx.trace(model, inputs=(X,))
        for tree in (model, opt):
            table: Any = tree.get_submodule("1")
            assert (table.table, table.length, table.made) == (None, 0, {"lengths": []})
        for length in (5, 3, 9, 4):
            x = torch.randn(2, length, 16)
            assert torch.equal(opt(x), model(x)), length
