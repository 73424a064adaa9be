"""A trace runs the model's code, and leaves no trace of that on the model."""

from __future__ import annotations

import copy
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


def test_an_offloaded_model_is_optimised_and_left_as_it_is() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = Untouched(model)
    opt = liger_fx.optimize(model, inputs)
    assert before.changes() == [] and fakes_of(model) == [] and fakes_of(opt) == []
    assert any("hook of accelerate" in text for text in opt.report.opaque)
    for hooked, own in zip(model.modules(), opt.modules(), strict=False):
        forward = getattr(own, "__dict__", {}).get("forward")
        if forward is not None:  # moves the weights of the copy, by the copy's own hook
            assert forward.args[0] is not hooked
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.allclose(opt(**inputs).logits, expected, atol=1e-5)


def test_an_optimised_model_is_offloaded_afterwards() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = model(**inputs).logits
    accelerate.cpu_offload(opt, execution_device=torch.device("cpu"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
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


class Writes(nn.Module):
    """Stands for a module that keeps something; ``kept`` is what, as far as it can be compared."""

    kept: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)


class Counts(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return self.linear(x) / self.step


class Averages(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean: torch.Tensor = self.mean * 0.9 + x.detach().mean((0, 1)) * 0.1
        return self.linear(x) + self.mean


class Logs(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.log: dict[str, list[int]] = {"seen": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log["seen"].append(1)
        return self.linear(x) * len(self.log["seen"])


class CountsInPlace(Writes):
    """The loop makes it a module that is called; running it once to see must change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.linear(x) * float(self.seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Counts, Averages, Logs, CountsInPlace])
def test_a_module_that_writes_to_itself_is_called(make: type[nn.Module]) -> None:
    module = make()
    model = nn.Sequential(nn.Linear(16, 16), module, nn.Linear(16, 16))
    twin = copy.deepcopy(model)
    before = Untouched(model)
    opt = liger_fx.trace(model, inputs=(X,))
    assert before.changes() == []
    (leaf,) = opt.plans[0].opaque
    assert leaf.path == "1"
    assert make is CountsInPlace or "its forward changes its own attribute" in leaf.reason
    for _ in range(3):
        assert torch.equal(opt(X), twin(X))


@pytest.mark.parametrize("make", [Counts, Averages, Logs])
def test_a_model_that_writes_to_itself_is_refused(make: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match="its forward changes its own attribute"):
        liger_fx.trace(make(), inputs=(X,))


class Stores(Writes):
    """Leaves a loss behind for the code around it."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.loss = y.pow(2).mean()
        return y


class IgnoresResult(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.stores = Stores()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stores(x)
        return self.linear(x)


class ReadsLoss(IgnoresResult):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stores(x)
        return y + self.stores.loss if hasattr(self.stores, "loss") else y


class WritesToAnother(IgnoresResult):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear.scale = x.mean()
        return self.linear(x) * self.linear.scale


def test_what_is_left_behind_can_be_read_from_outside() -> None:
    model = IgnoresResult()
    opt = liger_fx.trace(model, inputs=(X,))
    assert [leaf.path for leaf in opt.plans[0].opaque] == ["stores"]
    for x in (X, 2 * X):
        assert torch.equal(opt(x), model(x))
        assert torch.equal(opt.stores.loss, model.stores.loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [ReadsLoss, WritesToAnother])
def test_the_code_around_is_called_too_where_it_reads_or_writes(make: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), make())
    opt = liger_fx.trace(model, inputs=(X,))
    assert "1" in [leaf.path for leaf in opt.plans[0].opaque]
    for x in (X, 2 * X):
        assert torch.equal(opt(x), model(x))
    with pytest.raises(TraceError):
        liger_fx.trace(make(), inputs=(X,))


class WritesTheSame(Writes):
    """Writes that change nothing: an equal value, a cast without effect, a buffer in place."""

    table: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(16))
        self.register_buffer("seen", torch.zeros(()))
        self.width, self.sizes = 16, [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = self.table.to(x.device)
        self.width, self.sizes = x.shape[-1], [1, 2]
        self.seen += 1
        return self.linear(x) * self.table + self.seen


def test_what_ends_as_it_was_is_not_changed() -> None:
    model = WritesTheSame()
    twin = copy.deepcopy(model)
    opt = liger_fx.trace(model, inputs=(X,))
    assert opt.plans[0].opaque == []
    for _ in range(2):
        assert torch.equal(opt(X), twin(X))
