"""Adapters of PEFT, put on before optimize or after: outputs, gradients, merged, saved, loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs.models import tiny, tiny_inputs
from tests.programs.support import (
    build,
    compare,
    graph_runs,
    make_inputs,
    optimize,
    run,
    same,
    train_step,
)

peft = pytest.importorskip("peft")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(target_modules=LINEARS, r=4, lora_alpha=8),
    "lora on attention": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    "lora on everything": lambda: peft.LoraConfig(target_modules="all-linear", r=4),
    "rslora": lambda: peft.LoraConfig(target_modules=LINEARS, r=4, use_rslora=True),
    "lora with a saved head": lambda: peft.LoraConfig(
        target_modules=["q_proj"], r=4, modules_to_save=["lm_head"]
    ),
    "lora of parameters": lambda: peft.LoraConfig(
        target_modules=["q_proj"], r=4, target_parameters=["o_proj.weight"]
    ),
    "dora": lambda: peft.LoraConfig(target_modules=LINEARS, r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "layernorm tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
    ),
}
PROMPTS = ("prompt tuning", "prefix tuning", "p-tuning")


def adapted(model: Any, kind: str) -> Any:
    """The model with a fresh adapter, its weights drawn so that it changes the answer."""
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, ADAPTERS[kind]())
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped


def adapter_off(m: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with m.disable_adapter(), torch.no_grad():
        return m(**inputs).logits


def step(model: Any, kind: str) -> Any:
    inputs = make_inputs(model, 2, 9, labels=True)
    results = [train_step(model.train(), inputs)]
    model.eval()
    with torch.no_grad():
        results.append(model(**inputs).logits)
    if kind not in PROMPTS:
        off = adapter_off(model, inputs)
        assert not torch.allclose(off, results[1], atol=1e-3), "the adapter does something"
        results.append(off)
    return results


@pytest.mark.parametrize("kind", ADAPTERS)
def test_put_on_after(kind: str) -> None:
    """Around the optimised model, as a training script does it."""
    compare(
        build("llama"),
        lambda m: step(adapted(m, kind), kind),
        calls=2,
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_put_on_before(kind: str) -> None:
    """optimize() of the PEFT model itself, without example inputs."""
    compare(adapted(build("llama"), kind), lambda m: step(m, kind), calls=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in ADAPTERS if k not in PROMPTS])
def test_put_on_before_and_the_inner_model_optimised(kind: str) -> None:
    """The adapters sit in the model; the wrapper is left out."""
    wrapped = adapted(build("llama"), kind)

    def program(m: Any) -> Any:
        return train_step(m, make_inputs(m, 2, 9, labels=True))

    compare(wrapped.base_model.model, program)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2", "t5"])
def test_other_families(name: str, kind: str) -> None:
    config = peft.LoraConfig(target_modules="all-linear", r=4, use_dora=kind == "dora")

    def program(m: Any) -> Any:
        torch.manual_seed(7)
        wrapped = peft.get_peft_model(m, config)
        return train_step(wrapped, tiny_inputs(m, labels=True))

    compare(tiny(name), program)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_merged(kind: str) -> None:
    """merge_and_unload() gives the plain model with other weights, still by graphs."""

    def program(m: Any) -> Any:
        wrapped = adapted(m, kind)
        inputs = make_inputs(m, 2, 9, pad=True)
        with torch.no_grad():
            before = wrapped(**inputs).logits
            wrapped.merge_adapter()
            merged = wrapped(**inputs).logits
            wrapped.unmerge_adapter()
            plain = wrapped.merge_and_unload()
            after = plain(**inputs).logits
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
        assert not any("lora" in name for name, _ in plain.named_modules())
        return before, merged, after

    compare(build("llama"), program, calls=3)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt tuning"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    """What an adapter on the optimised model saves, an adapter on the original loads; and back."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    ours, theirs = adapted(opt, kind), adapted(twin_of, kind)
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = theirs(**inputs).logits
    for name, wrapped in (("ours", ours), ("theirs", theirs)):
        wrapped.save_pretrained(tmp_path / name)
    files = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("ours", "theirs")]
    assert files[0] == files[1]
    plain = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(optimize(build("llama")), tmp_path / "theirs")
    with torch.no_grad():
        same(plain.eval()(**inputs).logits, expected)
        with graph_runs(again):
            same(again.eval()(**inputs).logits, expected)


@pytest.mark.slow
def test_two_adapters_in_turn() -> None:
    def program(m: Any) -> Any:
        wrapped = adapted(m, "lora")
        torch.manual_seed(9)
        wrapped.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
        inputs = make_inputs(m, 2, 9, labels=True)
        results = []
        for name in ("second", "default", "second"):
            wrapped.set_adapter(name)
            results.append(train_step(wrapped, inputs))
        return results

    compare(build("llama"), program, calls=3)


@pytest.mark.parametrize("targets", [["gate_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.filterwarnings("ignore::liger_fx.errors.FallbackWarning")
def test_another_adapter_for_each_row(targets: list[str]) -> None:
    """PEFT puts hooks on its layers for the time of such a call."""
    config = peft.LoraConfig(
        target_modules=targets, r=4, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(build("llama"), config)
    model.add_adapter("other", config)
    model.eval()
    opt = optimize(copy.deepcopy(model))
    inputs = make_inputs(model, 2, 9)
    seen = []
    with torch.no_grad():
        for names in (["default", "other"], ["other", "other"], None, ["__base__", "other"]):
            given = inputs if names is None else inputs | {"adapter_names": names}
            seen.append(model(**given).logits)
            same(opt(**given).logits, seen[-1])
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


def test_generate_with_an_adapter() -> None:
    def program(m: Any) -> Any:
        wrapped = adapted(m, "lora").eval()
        inputs = make_inputs(m, 2, 5)
        return wrapped.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )

    compare(build("llama"), program, calls=6)


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_generate_with_a_prompt(kind: str) -> None:
    def program(m: Any) -> Any:
        wrapped = adapted(m, kind).eval()
        inputs = make_inputs(m, 2, 5)
        return wrapped.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )

    compare(build("llama"), program, calls=6)


def test_injected_by_transformers() -> None:
    """model.add_adapter(), the mixin of transformers itself."""

    def program(m: Any) -> Any:
        torch.manual_seed(7)
        m.add_adapter(peft.LoraConfig(target_modules=LINEARS, r=4, init_lora_weights=False))
        inputs = make_inputs(m, 2, 9, labels=True)
        on = train_step(m, inputs)
        m.disable_adapters()
        with torch.no_grad():
            off = m(**inputs).logits
        m.enable_adapters()
        return on, off

    compare(build("llama"), program, calls=2)


@pytest.mark.slow
def test_gradient_checkpointing_with_lora() -> None:
    def program(m: Any) -> Any:
        m.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        wrapped = adapted(m, "lora").train()
        return train_step(wrapped, make_inputs(m, 2, 9, labels=True))

    compare(build("llama"), program, calls=2)


def test_the_original_gets_no_adapter() -> None:
    model = build("llama")
    before = copy.deepcopy(model)
    opt = optimize(model)
    adapted(opt, "lora")
    inputs = make_inputs(model, 2, 9, pad=True)
    assert not any("lora" in name for name, _ in model.named_modules())
    with torch.no_grad():
        same(run(lambda m: m(**inputs).logits, model), run(lambda m: m(**inputs).logits, before))
