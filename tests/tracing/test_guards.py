"""A graph serves the calls it was traced for, and no other."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx
from liger_fx.errors import FallbackWarning
from tests.support.work import lines_run
from tests.tracing import custom


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def holds(traced: Any, arguments: dict[str, Any]) -> bool:
    """Whether the first graph serves such a call."""
    return traced.serving(arguments) is traced.plans[0]


IDS = torch.randint(3, 64, (2, 7))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def test_a_branch_on_a_size_gets_one_graph_a_side() -> None:
    module = custom.ReadsLength()
    traced = liger_fx.trace(module, (torch.randn(3, 11),))
    assert "x_1 > 8" in " ".join(traced.plans[0].guards.sizes)
    for length in (20, 9, 8, 1):
        x = torch.randn(3, length)
        assert torch.equal(traced(x), module(x))
    assert len(traced.plans) >= 2
    assert holds(traced, {"x": torch.randn(5, 9)})
    assert not holds(traced, {"x": torch.randn(5, 8)})


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": None},
        {"attention_mask": CALL["attention_mask"].float()},
        {"attention_mask": torch.ones(2, 8, dtype=torch.long)},
        {"attention_mask": torch.ones(2, 1, 7, 7, dtype=torch.bool)},
        {"use_cache": False},
        {"labels": IDS},
        {"input_ids": IDS.int()},
    ],
    ids=["missing", "dtype", "size", "rank", "constant", "extra", "ids"],
)
def test_other_inputs_break_the_guards(change: dict) -> None:
    traced = liger_fx.trace(llama())
    assert holds(traced, CALL)
    call = {k: v for k, v in {**CALL, **change}.items() if v is not None}
    assert not holds(traced, call)


def test_modes_dtypes_hooks_and_config_break_the_guards() -> None:
    traced = liger_fx.trace(llama())
    with torch.no_grad():
        assert holds(traced, CALL), "its code does not ask for the grad mode"
        assert traced.model.serving(CALL) is None, "it has a region without gradients"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not holds(traced, CALL)
    traced.train()
    assert not holds(traced, CALL)
    traced.eval()
    traced.model.rotary_emb.register_forward_hook(lambda *_: None)
    assert not holds(traced, CALL), "a module that the graph goes through would not be called"
    traced.model.rotary_emb._forward_hooks.clear()
    traced.model.layers[0].register_forward_hook(lambda *_: None)
    assert holds(traced, CALL), "a block is called, hooks and all"
    traced.config.output_hidden_states = True
    assert not holds(traced, CALL)
    traced.config.output_hidden_states = False
    assert holds(traced, CALL)
    traced.to(torch.bfloat16)
    assert not holds(traced, CALL)


def test_what_changes_between_the_trace_and_the_first_call_breaks_the_guards() -> None:
    traced = liger_fx.trace(llama())
    traced.to(torch.bfloat16)
    assert not holds(traced, CALL)
    assert traced(**CALL).logits.dtype == torch.bfloat16
    traced = liger_fx.trace(llama())
    traced.config.use_cache = False
    assert not holds(traced, CALL)
    assert traced(**CALL).past_key_values is None


def test_the_attention_implementation_may_change_without_a_new_graph() -> None:
    model = llama()
    traced = liger_fx.trace(model)
    traced.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    assert torch.equal(traced(**CALL).logits, model(**CALL).logits)
    assert len(traced.plans) == 1


def test_each_kind_of_call_is_traced_once_and_kept() -> None:
    model = llama()
    traced = liger_fx.trace(model)
    embeds = torch.randn(2, 5, 32)
    positions = torch.arange(5)[None] + 2
    for _ in range(2):
        for call in (
            CALL,
            {"input_ids": IDS},
            {"input_ids": IDS, "labels": IDS},
            {"inputs_embeds": embeds},
            {"inputs_embeds": embeds, "position_ids": positions},
        ):
            assert torch.equal(traced(**call).logits, model(**call).logits)
        assert len(traced.plans) == 5
    assert torch.equal(traced(IDS).logits, model(IDS).logits)
    assert len(traced.plans) == 5  # positional arguments are the same call


def test_a_cache_handed_in_is_served_by_a_graph() -> None:
    model = llama()
    traced = liger_fx.trace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (1, 3, 2):
            cache = traced(**CALL).past_key_values
            step = traced(IDS[:, :length], past_key_values=cache)
            expected = model(IDS[:, :length], past_key_values=model(**CALL).past_key_values)
            assert torch.equal(step.logits, expected.logits)
            assert cache.get_seq_length() == 7 + length
    assert len(traced.plans) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_graphs(reentrant: bool) -> None:
    model = llama()
    traced = liger_fx.trace(model)
    for m in (model.train(), traced.train()):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.zero_grad()
    gradients = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for m in (model, traced):
            m.zero_grad()
            m(**CALL, labels=IDS).loss.backward()
            gradients.append([p.grad.clone() for p in m.parameters()])
    assert all(map(torch.equal, *gradients))
    assert traced.model.layers[0].plans


def test_a_module_with_a_hook_is_called() -> None:
    traced, seen = liger_fx.trace(llama()), list[int]()
    expected = traced(**CALL).logits
    traced.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(traced(**CALL).logits, expected)
    assert seen == [1]


def test_a_call_that_no_graph_can_serve_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            if y is not None and y.sum() > 0:
                return x + y
            return x * 2

    module, x = Asks(), torch.ones(2, 3)
    traced = liger_fx.trace(module, {"x": x})
    tries, plan_for = [], traced._block.planner.plan_for

    def counting(*args: Any) -> Any:
        tries.append(args)
        return plan_for(*args)

    monkeypatch.setattr(traced._block.planner, "plan_for", counting)
    with pytest.warns(FallbackWarning, match="data") as told:
        for _ in range(3):
            assert torch.equal(traced(x, x), module(x, x))
    assert len(tries) == 1
    assert len([w for w in told if w.category is FallbackWarning]) == 1


def test_a_plain_argument_that_changes_every_time_does_not_pile_up_graphs() -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return x * by if by < 100 else x

    module = Scales()
    x = torch.randn(2, 3)
    traced = liger_fx.trace(module, {"x": x, "by": 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(40):
            assert torch.equal(traced(x, by=float(i)), x * i)
    assert len(traced.plans) <= 16
    assert [w for w in caught if w.category is FallbackWarning]


def test_a_plain_argument_that_is_not_asked_for_its_value_is_an_input() -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor, by: float, n: int = 1) -> torch.Tensor:
            for _ in range(n):
                x = x * by
            return x

    module, x = Scales(), torch.randn(2, 3)
    traced = liger_fx.trace(module, {"x": x, "by": 0.5})
    for i in range(40):
        assert torch.equal(traced(x, by=float(i)), x * i)
    assert len(traced.plans) == 1
    for n in (2, 3, 2):  # a number of rounds is no input
        assert torch.equal(traced(x, by=0.25, n=n), module(x, 0.25, n))


def test_guards_are_readable() -> None:
    lines = liger_fx.trace(llama()).plans[0].guards.describe()
    assert "input_ids is int64[batch, sequence] on cpu" in lines
    assert "the model is in eval mode" in lines


def test_checking_guards_is_little_work_at_any_depth() -> None:
    counts = []
    for layers in (2, 32):
        traced = liger_fx.trace(llama(layers))
        assert holds(traced, CALL)
        counts.append(lines_run(partial(traced.serving, CALL)))
    assert counts[1] < 2 * counts[0] < 1000  # microseconds: tools/bench/overheads.py
