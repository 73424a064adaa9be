"""What trainers need: data from lists, a tokenizer made in memory, the curve of the losses."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.support.families import VOCAB

WORDS = """
the a cat dog bird tree house river runs sleeps sings falls stands flows fast slow red blue green
old new good bad big small is was and or not what where who user assistant system
""".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant "
    "{% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}{{ m.role }} {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, of the ids that tests/support/families.py has."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {word: 4 + i for i, word in enumerate(WORDS)}
    assert len(vocabulary) <= VOCAB
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="right",
    )


def texts(count: int = 12) -> list[str]:
    """Sentences of 4 to 9 words."""
    generator = torch.Generator().manual_seed(0)

    def words(number: int) -> str:
        picks = torch.randint(0, len(WORDS), (number,), generator=generator)
        return " ".join(WORDS[int(i)] for i in picks)

    return [words(4 + i % 6) for i in range(count)]


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Twelve fixed rows of random ids."""

    def __init__(self, length: int = 17) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 90, (12, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def arguments(folder: Path, kind: type = TrainingArguments, **options: Any) -> Any:
    """Three quiet steps of plain SGD: Adam makes a whole step of what is nothing but rounding."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": [],
        "max_grad_norm": 0.0,
        "seed": 3,
    }
    return kind(**(settings | options))


def curve(trainer: Trainer, count: int = 3, **options: Any) -> list[float]:
    """The losses of each step that the trainer logs; they must not stand still."""
    trainer.train(**options)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == count, found
    assert len(set(found)) > 1, found
    return found
