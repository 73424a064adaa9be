"""Architectures with habits of their own: decoders with encoders, scans, constants, complex."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import liger_fx
from liger_fx.tiny import tiny_model
from tests.storage.files import contents


@pytest.mark.parametrize(
    "name",
    [
        "bart",
        "bamba",
        "cpmant",
        "ctrl",
        "gpt2",
        "llama4_text",
        "mamba",
        "mllama",
        "olmo_hybrid",
        "xlnet",
    ],
)
def test_it_comes_back(name: str, tmp_path: Path) -> None:
    opt = liger_fx.optimize(tiny_model(name, 2))
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    liger_fx.save(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ids = torch.randint(3, 100, (2, 11))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded(**call).logits, opt(**call).logits)
    assert len(loaded.plans) == len(opt.plans) and loaded.code == opt.code
