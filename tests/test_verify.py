"""verify: it passes what is right, and it finds and names each planted fault.

A fault is planted in one module of an optimised model, the way a kernel or a rule could get it
wrong; verify must say that module's path, and say no other's.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import liger_fx
from liger_fx.errors import UsageError
from liger_fx.inputs import example_inputs
from liger_fx.tiny import tiny_model
from liger_fx.verification import verdict
from liger_fx.verification.calls import calls_of
from liger_fx.verification.whole import measure as right_measure
from tests.support.marks import slow_but

Plant = Callable[[nn.Module], None]

NORM = "model.layers.1.input_layernorm"
ROTARY = "model.layers.1.self_attn.rotary_embedding"
MLP = "model.layers.1.mlp"


def forward(change: Callable[..., Any]) -> Plant:
    """Replaces a module's forward by `change(its forward, *args)`, also in copies of the module."""

    def plant(module: nn.Module) -> None:
        right = type(module)

        def wrong(self: nn.Module, *args: Any) -> Any:
            return change(functools.partial(right.forward, self), *args)

        module.__class__ = type(right.__name__, (right,), {"forward": wrong})

    return plant


def setting(name: str, value: object) -> Plant:
    return lambda module: setattr(module, name, value)


def scaled(parameter: str) -> Plant:
    """The module has a stale copy of its weight, not the model's."""

    def plant(module: nn.Module) -> None:
        owner, _, name = parameter.rpartition(".")
        holder = module.get_submodule(owner)
        setattr(holder, name, nn.Parameter(getattr(holder, name).detach() * 1.01))

    return plant


def copied(parameter: str) -> Plant:
    """The same values in a parameter of its own: right today, and never trained."""
    return lambda module: setattr(module, parameter, copy.deepcopy(getattr(module, parameter)))


def swap_roles(module: nn.Module) -> None:
    roles: Any = module.roles
    module.roles = {**roles, "gate": roles["up"], "up": roles["gate"]}


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.zeros_like(grad), grad


FAULTS: dict[str, tuple[str, Plant]] = {
    "eps ten times too large": (NORM, setting("eps", 1e-5)),
    "eps too small by half": (NORM, setting("eps", 5e-7)),
    "eps is zero": (NORM, setting("eps", 0.0)),
    "1 + weight": (NORM, setting("offset", 1.0)),
    "stale norm weight": (NORM, scaled("weight")),
    "copied norm weight": (NORM, copied("weight")),
    "norm over the wrong dimension": (NORM, forward(lambda f, x: f(x.flip(1)))),
    "norm is the identity": (NORM, forward(lambda f, x: x)),
    "norm without weight": (NORM, forward(lambda f, x: f(x, torch.ones_like(x[0, 0])))),
    "norm result in float32": (NORM, forward(lambda f, x: f(x).float())),
    "norm rounds through bfloat16": (NORM, forward(lambda f, x: f(x).bfloat16().to(x.dtype))),
    "norm detached": (NORM, forward(lambda f, x: f(x.detach()))),
    "sign of sin": (ROTARY, forward(lambda f, q, k, cos, sin: f(q, k, cos, -sin))),
    "cos and sin swapped": (ROTARY, forward(lambda f, q, k, cos, sin: f(q, k, sin, cos))),
    "interleaved": (ROTARY, setting("interleaved_in", True)),
    "only q turned": (ROTARY, forward(lambda f, q, k, cos, sin: (f(q, k, cos, sin)[0], k))),
    "positions off by one": (
        ROTARY,
        forward(lambda f, q, k, cos, sin: f(q, k, cos.roll(1, 1), sin.roll(1, 1))),
    ),
    "no gradient for k": (
        ROTARY,
        forward(lambda f, q, k, cos, sin: (f(q, k, cos, sin)[0], f(q, k.detach(), cos, sin)[1])),
    ),
    "gate and up swapped": (MLP, swap_roles),
    "another activation": (MLP, setting("activation", "gelu")),
    "stale down_proj": (MLP, scaled("down_proj.weight")),
    "MLP doubled": (MLP, forward(lambda f, x: 2 * f(x))),
    "MLP backward is zero": (MLP, forward(lambda f, x: _NoGradient.apply(x, f(x.detach())))),
    "MLP raises": (MLP, forward(lambda f, x: f(x.unsqueeze(0).expand(2, -1, -1, -1).flatten()))),
}


# Planted in bfloat16, whose rounding hides most; here the fault would be none in that dtype.
DTYPES = {"norm rounds through bfloat16": torch.float32}


def pair(arch: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A model and its optimised twin."""
    model = tiny_model(arch, layers=2).to(dtype)
    opt = liger_fx.optimize(model)
    opt(**example_inputs(model, 2, 5))  # the graph with labels, before any fault is planted
    return model, opt


@functools.cache
def kept_pair(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """For tests that leave both as they are."""
    return pair("llama", dtype)


@contextmanager
def put_back(module: nn.Module) -> Iterator[None]:
    parts = [(m, type(m), dict(m.__dict__), dict(m._parameters)) for m in module.modules()]
    try:
        yield
    finally:
        for part, cls, attributes, parameters in parts:
            part.__class__ = cls
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._parameters.clear()
            part._parameters.update(parameters)


ARCHS = ("llama", "gemma2", "phi3", "glm4", "cohere2", "deepseek_v3")
# One fault of each kind in every run.
_SHORT = {
    "eps ten times too large", "1 + weight", "copied norm weight", "norm detached", "sign of sin",
    "interleaved", "no gradient for k", "gate and up swapped", "another activation",
    "MLP backward is zero", "MLP raises",
}  # fmt: skip


@pytest.mark.parametrize("fault", slow_but(_SHORT, FAULTS))
def test_a_planted_fault_is_found_and_named(fault: str) -> None:
    path, plant = FAULTS[fault]
    model, opt = kept_pair(DTYPES.get(fault, torch.bfloat16))
    with put_back(opt.get_submodule(path)):
        plant(opt.get_submodule(path))
        found = liger_fx.verify(model, opt)
    assert not found.ok
    assert {site.path for site in found.sites if site.fault} == {path}
    assert found.faults[0].startswith(path + " (")
    assert "NOT as promised" in str(found) and "FAILS" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arch",
    slow_but(["llama", "gemma2"], ["llama", "gemma2", "phi3", "glm4", "cohere2", "deepseek_v3"]),
)
def test_what_is_right_passes_at_every_site(arch: str, dtype: torch.dtype) -> None:
    model, opt = pair(arch, dtype)
    found = liger_fx.verify(model, opt)
    assert found.ok, str(found)
    assert len(found.sites) == len(opt.report.rewritten) > 0
    assert all(site.gap is not None and site.gap < 1e-12 for site in found.sites)
    assert {c.name for c in found.single} == {name for name, _ in model.named_parameters()}


def test_a_model_with_weights_of_its_own(tmp_path: Path) -> None:
    model, opt = pair("llama")
    liger_fx.save(opt, tmp_path / "graph")
    loaded = liger_fx.load(tmp_path / "graph")
    found = liger_fx.verify(model, loaded)
    assert found.ok and len(found.sites) == 10, str(found)
    with torch.no_grad():
        loaded.model.norm.weight.mul_(1.01)
    found = liger_fx.verify(model, loaded)
    (fault,) = [site.fault for site in found.sites if site.fault]
    assert fault == "its model.norm.weight has other values than the model's"


def test_a_fault_that_no_site_holds_is_found_in_the_whole() -> None:
    model, opt = pair("llama")
    with put_back(opt.lm_head):
        opt.lm_head.weight = nn.Parameter(opt.lm_head.weight.detach() * 1.001)
        found = liger_fx.verify(model, opt)
    assert not any(site.fault for site in found.sites)
    assert any(fault.startswith("outputs: ") for fault in found.faults)


def test_the_graph_that_is_there_is_run_not_only_new_ones() -> None:
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model)  # traced without labels; verify's own inputs have labels
    layer = opt.model.layers[1]
    adds = [n for n in layer.graph.nodes if n.name.startswith("add")]
    adds[-1].op, adds[-1].target = "call_function", operator.sub
    layer.recompile()
    found = liger_fx.verify(model, opt)
    assert any(fault.startswith("outputs: ") for fault in found.faults)
    kinds = [set(kind.split(" 2 x ")[0].split()) for kind in found.inputs.split("; ")]
    assert {"input_ids", "attention_mask"} in kinds


def test_the_graphs_of_other_modes_are_run_in_their_modes() -> None:
    model = tiny_model("llama", layers=2).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    opt = liger_fx.optimize(model)
    with torch.no_grad():
        opt.eval()(**example_inputs(model, 2, 5))
    found = liger_fx.verify(model, opt)
    assert found.ok, str(found)
    assert "in train mode" in found.inputs and "without gradients" in found.inputs
    assert model.training and not opt.training and found.remarks == ()
    opt.model.norm.__class__ = _wrong_when(lambda norm, x: norm.training, opt.model.norm)
    with torch.no_grad():  # another class, so another graph
        opt.train()(**example_inputs(model, 2, 5))
    opt.eval()
    found = liger_fx.verify(model, opt)
    assert any(fault.startswith("outputs: ") for fault in found.faults), str(found)


def _wrong_when(applies: Callable[..., bool], module: nn.Module) -> type:
    right = type(module)

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return right.forward(self, x) * (1.01 if applies(self, x) else 1)

    return type(right.__name__, (right,), {"forward": forward})


def test_a_fault_of_long_inputs_alone_is_named() -> None:
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model)
    opt.model.norm.__class__ = _wrong_when(lambda norm, x: x.shape[1] > 20, opt.model.norm)
    found = liger_fx.verify(model, opt)
    assert {site.path for site in found.sites if site.fault} == {"model.norm"}


@pytest.mark.parametrize("positional", [True, False])
def test_inputs_that_another_graph_serves(positional: bool) -> None:
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model)  # for input_ids and attention_mask
    ids = torch.randint(3, 200, (2, 9))
    found = liger_fx.verify(model, opt, (ids,) if positional else {"input_ids": ids})
    assert found.ok, str(found)
    assert len(found.sites) == 9 and len(opt.plans) == 2
    embeds = model.get_input_embeddings()(ids).detach()
    found = liger_fx.verify(model, opt, {"inputs_embeds": embeds})
    assert found.ok and len(found.sites) == 9, str(found)


def test_graphs_for_which_no_call_can_be_made_are_told_of() -> None:
    model = tiny_model("llama", layers=2)
    ids = torch.randint(3, 200, (2, 9))
    given = {"input_ids": ids, "cache_position": torch.arange(9)}
    opt = liger_fx.optimize(model, given)
    found = liger_fx.verify(model, opt)
    assert any("cache_position was not run" in remark for remark in found.remarks)
    assert "Not looked at" in str(found) and found.ok
    assert liger_fx.verify(model, opt, given).remarks == ()


def test_what_cannot_be_verified_is_one_error() -> None:
    model, opt = pair("llama")
    with pytest.raises(UsageError, match="The optimised model is a int"):
        liger_fx.verify(model, 3)  # type: ignore[arg-type]
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(UsageError, match="verify works in torch.float64"):
            liger_fx.verify(model, opt, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="The original comes first"):
        liger_fx.verify(opt, model)
    with pytest.raises(UsageError, match="The original LlamaForCausalLM itself fails on these"):
        liger_fx.verify(model, opt, {})


def test_a_call_that_runs_the_original_proves_nothing() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return x * 2 if y is None or y.sum() > 0 else x

    model, x = Branches(), torch.ones(2, 3)
    opt = liger_fx.trace(model, {"x": x})
    with pytest.warns(liger_fx.FallbackWarning):
        found = liger_fx.verify(model, opt, {"x": x, "y": x})
    assert not found.ok
    assert any("no graph serves" in fault for fault in found.faults)


def test_inside_autocast_the_original_is_judged_in_autocast_too() -> None:
    model = tiny_model("llama", layers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt = liger_fx.optimize(model)
        found = liger_fx.verify(model, opt)
    assert found.ok, str(found)
    assert "in float32 under bfloat16 autocast on cpu" in str(found)
    assert found.together[0].original > 1e-4  # bfloat16's error, which float32 does not have
    assert len(found.sites) == 10  # the calls are made with labels: the loss is one


def test_nothing_of_the_models_is_changed() -> None:
    model = tiny_model("qwen3", layers=2)
    opt = liger_fx.optimize(model)
    liger_fx.verify(model, opt)  # calls of another kind: opt gets their graphs, and their modules
    model.model.layers[1].train()
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [m.training for m in (*model.modules(), *opt.modules())]
    liger_fx.verify(model, opt)
    assert [m.training for m in (*model.modules(), *opt.modules())] == modes
    assert model.lm_head.weight.grad is kept and model.model.norm.weight.grad is None
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


class Hand(nn.Module):
    """No transformers model: its inputs are given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 24)
        self.weight = nn.Parameter(torch.randn(24))
        self.outer = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4)
        return self.outer(scaled * self.weight)


@pytest.mark.parametrize("named", [False, True])
def test_any_module_with_inputs_given(named: bool) -> None:
    torch.manual_seed(0)
    model, x = Hand(), torch.randn(256, 7)
    inputs: Any = {"x": x} if named else (x,)
    opt = liger_fx.optimize(model, inputs)
    found = liger_fx.verify(model, opt, inputs)
    assert found.ok, str(found)
    assert len(found.sites) == 1
    (site,) = found.sites
    opt.get_submodule(site.path).eps = 1e-3
    assert liger_fx.verify(model, opt, inputs).faults[0].startswith(site.path)


def test_inputs_that_cannot_be_made_are_asked_for() -> None:
    with pytest.raises(UsageError, match="No inputs can be made for a Hand: pass inputs="):
        liger_fx.verify(Hand(), Hand())
    with pytest.raises(UsageError, match="inputs are a list"):
        liger_fx.verify(Hand(), Hand(), [torch.randn(4, 7)])


def test_a_call_whose_arguments_come_in_another_order() -> None:
    """A graph for images alone, and two for labels too, which name their inputs otherwise."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    given = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    opt = liger_fx.optimize(model)
    opt(**given)
    opt.train()(**given)
    assert liger_fx.verify(model, opt.eval(), given).ok


def inflated(times: float, draws: int) -> Callable[..., Any]:
    """`measure`, in which our errors are so many times as large in its first so many uses."""
    uses = 0

    def measure(*args: Any) -> Any:
        nonlocal uses
        uses += 1
        totals = right_measure(*args)
        if uses <= draws:
            for squares in (*totals.outputs.values(), *totals.gradients.values()):
                squares.optimised = squares.original * times**2
        return totals

    return measure


@pytest.mark.parametrize("times, draws, ok", [(1.3, 1, True), (1.3, 2, False), (4.0, 1, False)])
@pytest.mark.parametrize("own_inputs", [False, True])
def test_noise_is_told_from_fault_by_fresh_draws(
    times: float, draws: int, ok: bool, own_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = pair("llama")
    monkeypatch.setattr(verdict, "measure", inflated(times, draws))
    found = liger_fx.verify(model, opt, example_inputs(model, 2, 9) if own_inputs else None)
    assert found.ok == ok, str(found)
    assert found.inputs.startswith("5 draws of ") == (times < 2)


def test_a_fresh_draw_is_of_the_same_kind_with_other_numbers() -> None:
    model, _ = pair("llama")
    given = example_inputs(model, 2, 9)
    ways = (
        (calls_of(model, None), calls_of(model, None, 1)),
        (calls_of(model, given), calls_of(model, given, 1)),
    )
    for calls, others in ways:
        for call, other in zip(calls, others, strict=True):
            assert call.kwargs.keys() == other.kwargs.keys()
            ids, others_ids = (c.kwargs["input_ids"] for c in (call, other))
            assert ids.shape == others_ids.shape and not torch.equal(ids, others_ids)
    (call,) = ways[1][1]
    old, new = given["input_ids"].flatten(), call.kwargs["input_ids"].flatten()
    assert torch.equal(old.sort().values, new.sort().values)
    assert torch.equal(call.kwargs["attention_mask"], given["attention_mask"])
