"""The graph computes what the code does: values and gradients, at sizes it was not traced at."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BloomConfig, BloomForCausalLM

import liger_fx
from liger_fx.errors import TraceError
from tests.tracing import custom

EXAMPLE = torch.randn(3, 4)


@pytest.mark.parametrize(
    "module",
    [custom.InPlace(), custom.NoGradRegion(), custom.AutocastRegion(), custom.UsesConstant()],
    ids=lambda m: type(m).__name__,
)
def test_same_values_and_gradients(module: nn.Module) -> None:
    traced = liger_fx.trace(module, (EXAMPLE,))
    for rows in (1, 2, 5):
        x = torch.randn(rows, 4)
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        result, expected = traced(ours), module(theirs)
        assert len(traced.plans) == 1 or rows == 1
        assert torch.equal(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_no_grad_region_stops_gradients_and_leaves_the_callers_mode() -> None:
    module = custom.NoGradRegion()
    traced = liger_fx.trace(module, (EXAMPLE,))
    traced(torch.ones(2, 4)).sum().backward()
    gradient = module.scale.grad
    assert gradient is not None and gradient.tolist() == [2.0] * 4  # from the second product alone
    with torch.no_grad():
        assert not traced(torch.ones(2, 4)).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_an_error_inside_a_region_restores_the_modes() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                return x.index_select(0, rows)

    traced = liger_fx.trace(Breaks(), (EXAMPLE, torch.tensor([0, 1])))
    with pytest.raises(IndexError):
        traced(EXAMPLE, torch.tensor([0, 99]))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    linear = nn.Linear(4, 4)
    assert linear(EXAMPLE).dtype is torch.float32


def test_each_node_knows_its_module_and_source_line() -> None:
    module = nn.Sequential(nn.Linear(4, 4), custom.NoGradRegion())
    traced = liger_fx.trace(module, (EXAMPLE,))
    products = [n for n in traced.graph.nodes if n.target == "mul"]
    lines, first = inspect.getsourcelines(custom.NoGradRegion.forward)
    file = inspect.getsourcefile(custom.NoGradRegion)
    places = [first + i for i, line in enumerate(lines) if "self.scale" in line]
    assert [n.meta["source"] for n in products] == [(file, place) for place in places]
    assert {n.meta["module"] for n in products} == {"1"}
    assert [str(s) for s in products[0].meta["spec"].shape][1] == "4"


def test_data_dependence_below_the_top_stays_an_opaque_leaf() -> None:
    module = custom.HoldsSelects()
    traced = liger_fx.trace(module, (EXAMPLE,))
    (leaf,) = traced.plans[0].opaque
    assert (leaf.path, leaf.class_name) == ("select", "Selects")
    assert leaf.source is not None and leaf.source[0].endswith("custom.py")
    for x in (torch.ones(2, 4), -torch.ones(7, 4)):
        assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize(
    ("module", "cause"),
    [(custom.Selects(), "data-dependent"), (custom.Fails(), "no such luck")],
    ids=["data", "error"],
)
def test_what_cannot_be_traced_at_the_top_is_explained(module: nn.Module, cause: str) -> None:
    with pytest.raises(TraceError) as caught:
        liger_fx.trace(module, (EXAMPLE,))
    error = caught.value
    assert cause in error.cause and "Caused by" not in error.cause
    assert error.source is not None and error.source[0].endswith("custom.py")
    assert type(module).__name__ in str(error) and "The model itself works as before" in str(error)


def test_a_failing_submodule_is_named() -> None:
    with pytest.raises(TraceError, match="no such luck"):
        liger_fx.trace(nn.Sequential(nn.Linear(4, 4), custom.Fails()), (EXAMPLE,))


def test_nothing_fake_stays_on_the_model() -> None:
    stores = custom.StoresState()
    module = nn.Sequential(nn.Linear(4, 4), stores)
    traced = liger_fx.trace(module, (EXAMPLE,))
    for tree in (stores, traced.get_submodule("1")):
        assert type(tree.positions) is torch.Tensor and not hasattr(tree, "last")
    assert torch.equal(traced(EXAMPLE), module(EXAMPLE))


def test_autocast_keeps_no_fake_weight() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(EXAMPLE)
        traced = liger_fx.trace(module, (EXAMPLE,))
        assert torch.is_autocast_cache_enabled()
        assert torch.equal(module(EXAMPLE), expected)
        assert torch.equal(traced(EXAMPLE), expected)


def test_dropout_draws_the_same_numbers() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    traced = liger_fx.trace(module, (EXAMPLE,))
    torch.manual_seed(7)
    expected = module(EXAMPLE)
    torch.manual_seed(7)
    assert torch.equal(traced(EXAMPLE), expected)


def test_tracing_draws_no_random_numbers() -> None:
    module = custom.HoldsSelects()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    liger_fx.trace(module, (EXAMPLE,))
    assert torch.equal(torch.rand(2), expected)


def test_sizes_that_are_tried_in_vain_are_not_logged() -> None:
    shown: list[str] = []

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    log, handler = logging.getLogger("torch._subclasses.fake_tensor"), Shown()
    log.addHandler(handler)
    try:
        liger_fx.optimize(BloomForCausalLM(config))
        assert shown == []
        with FakeTensorMode(), pytest.raises(RuntimeError):  # of others they are, as ever
            torch.baddbmm(torch.ones(2, 3, 3), torch.ones(2, 3, 1), torch.ones(2, 2, 3))
        assert len(shown) == 1
    finally:
        log.removeHandler(handler)
