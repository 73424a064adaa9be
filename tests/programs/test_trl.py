"""TRL's trainers: equal curves of the loss, and the layers run by graphs.

TRL puts a forward of its own on the model that calls ``model.base_model`` and computes the loss
from its hidden states: what must be a graph here is the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.programs.support import (
    build,
    compare,
    graph_runs,
    optimize,
    perturb,
    run,
    same,
    weights,
)
from tests.programs.training import arguments, curve, texts, tokenizer
from tests.support.families import config

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

STEPS = 3
FAMILIES = [
    "llama",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("gemma2", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def no_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Datasets are mapped anew in each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    yield
    datasets.enable_caching()


def rows(**columns: list[Any]) -> Any:
    return datasets.Dataset.from_dict(columns)


def plain_texts() -> Any:
    return rows(text=texts())


def prompts_and_completions() -> Any:
    lines = texts(24)
    return rows(prompt=lines[:12], completion=[" " + line for line in lines[12:]])


def conversations() -> Any:
    lines = texts(24)
    return rows(
        messages=[
            [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
            for a, b in zip(lines[:12], lines[12:], strict=True)
        ]
    )


def preferences() -> Any:
    lines = texts(36)
    return rows(prompt=lines[:12], chosen=lines[12:24], rejected=lines[24:])


def lora(**options: Any) -> Any:
    """Drawn at random, so that the adapter takes part from the first step."""
    return peft.LoraConfig(
        target_modules=["q_proj", "v_proj"],
        r=4,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **options,
    )


def sft(m: Any, folder: Path, data: Any, peft_config: Any = None, **options: Any) -> Any:
    made = arguments(folder, trl.SFTConfig, **options)
    trainer = trl.SFTTrainer(
        model=m,
        args=made,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    return curve(trainer), weights(trainer.model)


SFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (plain_texts, {}),
    "truncated": (plain_texts, {"max_length": 5}),
    "accumulation": (
        plain_texts,
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ),
    "packing": (
        plain_texts,
        {"packing": True, "max_length": 16, "per_device_train_batch_size": 1},
    ),
    "wrapped packing": (
        plain_texts,
        {
            "packing": True,
            "packing_strategy": "wrapped",
            "max_length": 16,
            "per_device_train_batch_size": 1,
        },
    ),
    "padding-free": (plain_texts, {"padding_free": True, "max_length": None}),
    "completion only": (prompts_and_completions, {"completion_only_loss": True}),
    "assistant only": (conversations, {"assistant_only_loss": True}),
    "dft loss": (prompts_and_completions, {"loss_type": "dft"}),
    "checkpointing": (plain_texts, {"gradient_checkpointing": True}),
    "neftune": (plain_texts, {"neftune_noise_alpha": 5.0}),
}


@pytest.mark.parametrize("kind", SFT)
@pytest.mark.parametrize("name", FAMILIES)
def test_sft(name: str, kind: str, tmp_path: Path) -> None:
    data, options = SFT[kind]
    runs = STEPS * options.get("gradient_accumulation_steps", 1)
    compare(build(name), lambda m: sft(m, tmp_path, data(), **options), calls=runs)


@pytest.mark.parametrize("kind", ["plain", "packing", "checkpointing"])
def test_sft_with_lora(kind: str, tmp_path: Path) -> None:
    data, options = SFT[kind]
    compare(build("llama"), lambda m: sft(m, tmp_path, data(), lora(), **options), calls=STEPS)


@pytest.mark.slow
def test_sft_of_a_peft_model(tmp_path: Path) -> None:
    """The adapter around the optimised model, put on by the user."""

    def program(m: Any) -> Any:
        return sft(peft.get_peft_model(m, lora()), tmp_path, plain_texts())

    compare(build("llama"), program, calls=STEPS)


@pytest.mark.slow
def test_sft_in_bf16(tmp_path: Path) -> None:
    def program(m: Any) -> Any:
        return sft(m, tmp_path, plain_texts(), bf16=True)[0]

    compare(build("llama"), program, calls=STEPS, rtol=5e-3)


DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "precomputed": {"precompute_ref_log_probs": True},
    "padding-free": {"padding_free": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", DPO)
@pytest.mark.parametrize("name", FAMILIES)
def test_dpo(name: str, kind: str, tmp_path: Path) -> None:
    def program(m: Any) -> Any:
        trainer = trl.DPOTrainer(
            model=m,
            ref_model=build(name, seed=1),
            args=arguments(tmp_path, trl.DPOConfig, **DPO[kind]),
            train_dataset=preferences(),
            processing_class=tokenizer(),
        )
        return curve(trainer), weights(trainer.model)

    compare(build(name), program, calls=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["loaded reference", "lora"])
def test_dpo_without_a_reference(adapter: bool, tmp_path: Path) -> None:
    """TRL loads the reference by the name in the config, or takes the adapter off."""

    def program(m: Any) -> Any:
        trainer = trl.DPOTrainer(
            model=m,
            args=arguments(tmp_path, trl.DPOConfig),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            peft_config=lora() if adapter else None,
        )
        return curve(trainer), weights(trainer.model)

    compare(from_disk(tmp_path / "model"), program, calls=STEPS)


@pytest.mark.slow
def test_kto(tmp_path: Path) -> None:
    lines = texts(24)
    data = rows(
        prompt=lines[:12],
        completion=lines[12:],
        label=[i % 2 == 0 for i in range(12)],
    )

    def program(m: Any) -> Any:
        trainer = trl.KTOTrainer(
            model=m,
            ref_model=build("llama", seed=1),
            args=arguments(tmp_path, trl.KTOConfig),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        return curve(trainer), weights(trainer.model)

    compare(build("llama"), program, calls=STEPS)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


GRPO: dict[str, dict[str, Any]] = {
    "plain": {},
    "with a reference": {"beta": 0.1},
    "two iterations": {"num_iterations": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "continuous batching": {
        "use_transformers_continuous_batching": True,
        # by default most of the machine's memory becomes the cache
        "transformers_continuous_batching_config": {
            "page_size": 16,
            "num_blocks": 16,
            "max_batch_tokens": 64,
        },
    },
}


def from_disk(folder: Path) -> Any:
    """A model that has a name: TRL loads the reference by it."""
    build("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", GRPO)
def test_grpo(kind: str, tmp_path: Path) -> None:
    """Generates, scores and trains: the same completions, then the same losses."""

    def program(m: Any) -> Any:
        trainer = trl.GRPOTrainer(
            model=m,
            reward_funcs=reward,
            args=arguments(
                tmp_path,
                trl.GRPOConfig,
                num_generations=4,
                max_completion_length=6,
                temperature=1.0,
                **GRPO[kind],
            ),
            train_dataset=rows(prompt=texts()),
            processing_class=tokenizer(),
        )
        trainer.train()
        history = [e for e in trainer.state.log_history if "loss" in e]
        assert len(history) == STEPS
        names = ("loss", "grad_norm", "reward", "completions/mean_length", "entropy")
        assert any(e["grad_norm"] for e in history)
        return [[e.get(n) for n in names] for e in history], weights(trainer.model)

    # six calls to generate, one to learn from it
    compare(from_disk(tmp_path / "model"), program, calls=STEPS * 4)


@pytest.mark.slow
def test_rloo(tmp_path: Path) -> None:
    def program(m: Any) -> Any:
        trainer = trl.RLOOTrainer(
            model=m,
            reward_funcs=reward,
            args=arguments(tmp_path, trl.RLOOConfig, num_generations=4, max_completion_length=6),
            train_dataset=rows(prompt=texts()),
            processing_class=tokenizer(),
        )
        trainer.train()
        found = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert len(found) == STEPS
        return found, weights(trainer.model)

    compare(from_disk(tmp_path / "model"), program, calls=STEPS * 4)


def test_reward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(config("llama", num_labels=1))

    def program(m: Any) -> Any:
        trainer = trl.RewardTrainer(
            model=m,
            args=arguments(tmp_path, trl.RewardConfig),
            train_dataset=preferences(),
            processing_class=tokenizer(),
        )
        return curve(trainer), weights(trainer.model)

    compare(perturb(made), program, calls=STEPS)


@pytest.mark.slow
def test_saved_by_trl(tmp_path: Path) -> None:
    """What the trainer saves is the plain model, with the weights that were trained."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)

    def program(m: Any, folder: Path) -> Any:
        trainer = trl.SFTTrainer(
            model=m,
            args=arguments(folder, trl.SFTConfig),
            train_dataset=plain_texts(),
            processing_class=tokenizer(),
        )
        trainer.train()
        trainer.save_model(str(folder))
        return weights(AutoModelForCausalLM.from_pretrained(folder))

    theirs = run(lambda m: program(m, tmp_path / "theirs"), twin_of)
    with graph_runs(opt, calls=STEPS):
        same(run(lambda m: program(m, tmp_path / "ours"), opt), theirs)
