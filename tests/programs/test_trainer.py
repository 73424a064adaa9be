"""transformers' Trainer: equal curves of the loss, every step by graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from tests.programs.support import (
    build,
    compare,
    graph_runs,
    make_inputs,
    optimize,
    run,
    same,
    weights,
)
from tests.programs.training import Rows, arguments, curve

STEPS = 3


def train(model: Any, folder: Path, **options: Any) -> list[float]:
    made = arguments(folder, **options)
    trainer = Trainer(model=model, args=made, train_dataset=Rows())
    return curve(trainer)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "clipped": {"max_grad_norm": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "label smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "averaged tokens": {"average_tokens_across_devices": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_loss_curve(name: str, kind: str, tmp_path: Path) -> None:
    options = KINDS[kind]
    runs = STEPS * options.get("gradient_accumulation_steps", 1)
    if "gradient_checkpointing" in options:
        runs *= 2

    def program(m: Any) -> Any:
        return train(m, tmp_path / "run", **options), weights(m)

    compare(build(name), program, calls=runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_bf16(name: str, tmp_path: Path) -> None:
    """bf16 autocast: as near as bf16 is to itself."""
    compare(build(name), lambda m: train(m, tmp_path / "run", bf16=True), calls=STEPS, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama"])
def test_adamw(name: str, tmp_path: Path) -> None:
    options = {"optim": "adamw_torch", "learning_rate": 1e-3}
    compare(build(name), lambda m: train(m, tmp_path / "run", **options), calls=STEPS)


@pytest.mark.slow
def test_resume(tmp_path: Path) -> None:
    """Stopped after two steps and gone on with: the curve of one that was not stopped."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)

    def whole(m: Any, folder: Path) -> list[float]:
        return train(m, folder, lr_scheduler_type="constant")

    theirs = run(lambda m: whole(m, tmp_path / "theirs"), twin_of)
    with graph_runs(opt, calls=2):
        steady = {"lr_scheduler_type": "constant"}
        made = arguments(
            tmp_path / "ours", max_steps=2, save_strategy="steps", save_steps=2, **steady
        )
        first = curve(Trainer(model=opt, args=made, train_dataset=Rows()), 2)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["checkpoint-2"]
    again = optimize(build("llama", seed=5))
    with graph_runs(again):
        made = arguments(tmp_path / "ours", **steady)
        trainer = Trainer(model=again, args=made, train_dataset=Rows())
        found = curve(trainer, 3, resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    same(first, theirs[:2])
    same(found, theirs)
    same(weights(again), weights(twin_of))


@pytest.mark.slow
def test_the_checkpoint_is_the_plain_models(tmp_path: Path) -> None:
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    options = {"save_strategy": "steps", "save_steps": 3}
    for name, m in (("ours", opt), ("theirs", twin_of)):
        run(lambda m, name=name: train(m, tmp_path / name, **options), m)
    files = [
        sorted(p.name for p in (tmp_path / n / "checkpoint-3").iterdir())
        for n in ("ours", "theirs")
    ]
    assert files[0] == files[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-3")
    assert type(loaded) is type(twin_of)
    same(weights(loaded), weights(twin_of))


@pytest.mark.slow
def test_evaluate_and_predict(tmp_path: Path) -> None:
    def program(m: Any) -> Any:
        made = arguments(tmp_path, per_device_eval_batch_size=4)
        trainer = Trainer(model=m, args=made, train_dataset=Rows(), eval_dataset=Rows(9))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        assert before != after
        found = trainer.predict(Rows(9))
        return before, after, torch.from_numpy(found.predictions[0])

    compare(build("llama"), program, calls=3 + 3 * 3)


@pytest.mark.slow
def test_optimised_by_model_init(tmp_path: Path) -> None:
    def program(m: Any) -> Any:
        made = arguments(tmp_path)
        trainer = Trainer(model_init=lambda: m, args=made, train_dataset=Rows())
        return curve(trainer)

    compare(build("llama"), program, calls=STEPS)


@pytest.mark.slow
def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    def program(m: Any) -> Any:
        trainer = Trainer(
            model=m, args=arguments(tmp_path), train_dataset=Rows(), compute_loss_func=loss_of
        )
        return curve(trainer)

    compare(build("llama"), program, calls=STEPS)


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    """The Trainer compiles the model: as fast as a compiled model is, by our operators."""
    from tests.programs.test_compile import Operators

    model, twin_of = build("llama"), build("llama")
    theirs = run(lambda m: train(m, tmp_path / "theirs"), twin_of)
    opt = optimize(model)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    with Operators(name="eager") as seen:
        same(run(lambda m: train(m, tmp_path / "ours", **options), opt), theirs)
    seen.judge(opt, breaks=None)


def test_unwrapped_by_accelerate(tmp_path: Path) -> None:
    """Prepared for bf16 autocast and taken out of it again."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def program(m: Any) -> Any:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare_model(m, evaluation_mode=True)
        inputs = make_inputs(m, 2, 9)
        with torch.no_grad():
            within = prepared(**inputs).logits
            plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            # accelerate may take the model's own decorators off as well: a tuple comes out
            results = [within, plain(**inputs)[0]]
            kept = accelerator.unwrap_model(prepared)
        assert kept is m
        AcceleratorState._reset_state(True)
        return results

    compare(build("llama"), program, calls=2, rtol=0.05, atol=0.02)
