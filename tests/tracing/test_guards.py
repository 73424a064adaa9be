"""A graph serves the calls it was traced for, and no other."""

from __future__ import annotations

import warnings
from functools import partial

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
    assert traced.plans[0].holds(traced, {"x": torch.randn(5, 9)})
    assert not traced.plans[0].holds(traced, {"x": torch.randn(5, 8)})


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
    plan = traced.plans[0]
    assert plan.holds(traced, CALL)
    call = {k: v for k, v in {**CALL, **change}.items() if v is not None}
    assert not plan.holds(traced, call)


def test_modes_dtypes_hooks_and_config_break_the_guards() -> None:
    traced = liger_fx.trace(llama())
    plan = traced.plans[0]
    with torch.no_grad():
        assert not plan.holds(traced, CALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not plan.holds(traced, CALL)
    traced.train()
    assert not plan.holds(traced, CALL)
    traced.eval()
    traced.model.layers[1].self_attn.train()
    assert not plan.holds(traced, CALL)
    traced.eval()
    hook = traced.model.layers[0].register_forward_hook(lambda *_: None)
    assert not plan.holds(traced, CALL)
    hook.remove()
    traced.config.output_hidden_states = True
    assert not plan.holds(traced, CALL)
    traced.config.output_hidden_states = False
    assert plan.holds(traced, CALL)
    traced.to(torch.bfloat16)
    assert not plan.holds(traced, CALL)


def test_what_changes_between_the_trace_and_the_first_call_breaks_the_guards() -> None:
    traced = liger_fx.trace(llama())
    traced.to(torch.bfloat16)
    assert not traced.plans[0].holds(traced, CALL)
    assert traced(**CALL).logits.dtype == torch.bfloat16
    traced = liger_fx.trace(llama())
    traced.config.use_cache = False
    assert not traced.plans[0].holds(traced, CALL)
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


def test_a_cache_handed_in_runs_the_original_and_says_so_once() -> None:
    model = llama()
    traced = liger_fx.trace(model)
    first = traced(**CALL)
    with pytest.warns(FallbackWarning, match="past_key_values"):
        step = traced(IDS[:, :1], past_key_values=first.past_key_values)
    expected = model(IDS[:, :1], past_key_values=model(**CALL).past_key_values)
    assert torch.equal(step.logits, expected.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(IDS[:, :1], past_key_values=first.past_key_values)


def test_gradient_checkpointing_and_hooks_run_the_original() -> None:
    model = llama()
    traced = liger_fx.trace(model)
    traced.train()
    traced.gradient_checkpointing_enable()
    with pytest.warns(FallbackWarning, match="gradient checkpointing"):
        loss = traced(**CALL, labels=IDS).loss
    loss.backward()
    model.train()
    assert torch.equal(loss, model(**CALL, labels=IDS).loss)
    traced.gradient_checkpointing_disable()
    seen = []
    traced.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(FallbackWarning, match="hook"):
        traced(**CALL)
    assert seen == [1]


def test_a_call_that_no_graph_can_serve_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = liger_fx.trace(llama())
    make_plan, tries = traced._make_plan, []

    def counting(root: nn.Module, call: object) -> object:
        tries.append(call)
        return make_plan(root, call)  # type: ignore[arg-type]

    monkeypatch.setattr(traced, "_make_plan", counting)
    traced.train()
    traced.gradient_checkpointing_enable()
    with pytest.warns(FallbackWarning):
        for _ in range(3):
            traced(**CALL, labels=IDS)
    assert len(tries) == 1
    traced.gradient_checkpointing_disable()
    traced(**CALL, labels=IDS)
    assert len(tries) == 2 and len(traced.plans) == 2


def test_a_plain_argument_that_changes_every_time_does_not_pile_up_graphs() -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return x * by

    module = Scales()
    x = torch.randn(2, 3)
    traced = liger_fx.trace(module, {"x": x, "by": 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(40):
            assert torch.equal(traced(x, by=float(i)), x * i)
    assert len(traced.plans) <= 16
    assert [w for w in caught if w.category is FallbackWarning]


def test_guards_are_readable() -> None:
    lines = liger_fx.trace(llama()).plans[0].guards.describe()
    assert "input_ids is int64[batch, sequence] on cpu" in lines
    assert "the model is in eval mode" in lines


def test_checking_guards_is_little_work_at_any_depth() -> None:
    counts = []
    for layers in (2, 32):
        traced = liger_fx.trace(llama(layers))
        plan = traced.plans[0]
        assert plan.holds(traced, CALL)
        counts.append(lines_run(partial(plan.holds, traced, CALL)))
    assert counts[1] < 2 * counts[0] < 1000  # microseconds: tools/bench/overheads.py
