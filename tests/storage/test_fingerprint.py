"""Changed model code is noticed, other versions with the same code are fine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import liger_fx
from liger_fx.errors import LoadError, SaveError
from liger_fx.model.block import Block
from liger_fx.storage import fingerprint
from liger_fx.storage.original import Original
from tests.storage.files import edit
from tests.support.families import make_inputs

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return helper(self.linear(x))


def helper(x):
    return x * 2
"""


def import_net(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of that text, as a process that starts anew would import it."""
    (folder / "changing_net.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("changing_net", None)
    importlib.invalidate_caches()
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        return importlib.import_module("changing_net")
    finally:
        sys.dont_write_bytecode = before


def made(module: ModuleType) -> Any:
    torch.manual_seed(0)
    return module.Net().eval()


@pytest.mark.parametrize("change", [("x * 2", "x * 3"), ("helper(self", "self.linear(self")])
def test_changed_code_of_the_model_is_noticed(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(import_net(tmp_path, NET, monkeypatch))
    x = torch.randn(2, 4)
    traced = liger_fx.trace(model, (x,))
    liger_fx.save(traced, tmp_path / "graph", weights=False)
    again = made(import_net(tmp_path, NET, monkeypatch))
    assert torch.equal(liger_fx.load(tmp_path / "graph", model=again)(x), traced(x))
    changed = made(import_net(tmp_path, NET.replace(*change), monkeypatch))
    with pytest.raises(LoadError, match=r"has changed .changing_net.*liger_fx\.optimize"):
        liger_fx.load(tmp_path / "graph", model=changed)


def test_code_in_no_file_cannot_be_watched(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec(NET, scope)
    traced = liger_fx.trace(scope["Net"]().eval(), (torch.randn(2, 4),))
    with pytest.raises(SaveError, match="of <string>, nowhere, .* is in no file"):
        liger_fx.save(traced, tmp_path / "graph", weights=False)


def test_what_the_fingerprint_of_a_llama_covers(llama: Block) -> None:
    found = fingerprint.fingerprint(Original(llama).code, [plan.graph for plan in llama.plans]).code
    assert "transformers.models.llama.modeling_llama" in found
    assert "transformers.modeling_layers" in found
    assert not any(name.startswith(("torch", "liger_fx")) for name in found)
    assert all(len(digest) == 32 for digest in found.values())


@pytest.mark.parametrize("part", ["transformers.models.llama.modeling_llama", "x.y", None])
def test_other_code_of_transformers_is_refused_with_the_versions(
    part: str | None, saved: Path
) -> None:
    def change(document: Any) -> None:
        code = document["fingerprint"]["code"]
        if part is None:
            code.pop("transformers.models.llama.modeling_llama")
        else:
            code[part] = "0" * 32
        document["fingerprint"]["versions"]["transformers"] = "5.17.0"

    edit(saved / "graph.json", change)
    with pytest.raises(LoadError) as caught:
        liger_fx.load(saved)
    text = str(caught.value)
    assert (part or "transformers.models.llama.modeling_llama") in text
    assert "saved with transformers 5.17.0, here" in text and "make it anew" in text


def test_other_versions_of_the_same_code_load(llama: Block, saved: Path) -> None:
    def change(document: Any) -> None:
        document["fingerprint"]["versions"] = {"transformers": "5.17.0", "torch": "2.11.0"}

    edit(saved / "graph.json", change)
    inputs = make_inputs(llama)
    assert torch.equal(liger_fx.load(saved)(**inputs).logits, llama(**inputs).logits)
