"""Architectures with habits of their own: decoders with encoders, scans, constants, complex."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import liger_fx
from liger_fx.model.account import blocks_of
from liger_fx.model.block import Block
from liger_fx.tiny import tiny_model
from tests.storage.files import contents


def codes(opt: Block) -> dict[str, list[str]]:
    """The code of every graph, by the paths of the blocks."""
    return {
        path: [str(plan.graph.python_code("self").src) for plan in block.plans]
        for path, block in blocks_of(opt).items()
    }


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
    assert codes(loaded) == codes(opt)
