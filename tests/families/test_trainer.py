"""transformers' Trainer trains the result as it does the original: same losses and checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import liger_fx
from tests.support.families import VOCAB, build


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Twelve fixed rows of random ids."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCAB, (12, 17), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def losses(model: Any, folder: Path, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.5,
        optim="sgd",  # Adam makes a whole step of a gradient that is nothing but rounding
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_three_steps(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = losses(build(name), tmp_path / "theirs", **options)
    ours = losses(liger_fx.optimize(build(name)), tmp_path / "ours", **options)
    assert len(theirs) == 3 and theirs[0] != theirs[2]
    assert ours == pytest.approx(theirs, rel=2e-3 if options else 2e-6)
    saved = [
        AutoModelForCausalLM.from_pretrained(tmp_path / kind / "checkpoint-3").state_dict()
        for kind in ("ours", "theirs")
    ]
    assert saved[0].keys() == saved[1].keys()
    for key, tensor in saved[1].items():
        torch.testing.assert_close(
            saved[0][key], tensor, rtol=0, atol=5e-3 if options else 1e-5, msg=key
        )
