"""Schema version 2, kept as a file: every later version reads it, or says which one does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import liger_fx
from liger_fx.errors import LoadError
from liger_fx.storage.records import SCHEMA
from liger_fx.storage.saved import read_saved
from tests.storage.files import ROOT, edit

VERSION_2 = Path(__file__).parent / "schema_2"
DOCS = ROOT / "docs" / "graph-format.md"


def test_version_2_is_read() -> None:
    found = read_saved(VERSION_2)
    assert found.document.model.class_ == "LlamaForCausalLM"
    paths = [block.paths for block in found.blocks]
    assert paths == [[""], ["model"], ["model.layers.0", "model.layers.1"]]
    assert [block.attributes for block in found.blocks] == [[], [], ["self_attn.layer_idx"]]
    assert [len(block.plans) for block in found.blocks] == [1, 1, 1] and len(found.plans) == 3
    assert found.plans[0].guards.call.tensors["input_ids"].sizes == ("batch", "sequence")
    assert {record.class_ for record in found.document.named_modules} == {
        "LigerRotaryEmbedding", "LigerSwiGLUMLP", "LigerRMSNorm",
    }  # fmt: skip
    assert found.report is not None and len(found.report.rewritten) == 9


def test_version_2_loads_or_says_what_changed() -> None:
    saved = json.loads((VERSION_2 / "graph.json").read_text())
    given = safetensors.torch.load_file(VERSION_2.parent / "schema_2_call.safetensors")
    try:
        opt = liger_fx.load(VERSION_2)
    except LoadError as error:
        version = saved["fingerprint"]["versions"]["transformers"]
        assert "has changed" in str(error) and f"transformers {version}, here" in str(error)
        return
    logits = opt(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(logits, given["logits"])
    assert len(opt.plans) == 1


@pytest.mark.parametrize(
    "schema, why",
    [
        (1, "is 1, which liger_fx 0.1 reads; this one reads 2"),
        (3, "is 3, of a later liger_fx; this one reads 2"),
        (99, "is 99, of a later liger_fx"),
    ],
)
def test_another_version_says_so_before_anything_else(
    schema: int, why: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(VERSION_2, tmp_path / "graph"))
    edit(folder / "graph.json", lambda d: {"format": d["format"], "schema": schema, "new": []})
    with pytest.raises(LoadError, match=f"schema: {why}"):
        liger_fx.load(folder)


def test_the_documentation_has_every_field() -> None:
    text = DOCS.read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+)`", text))
    saved = json.loads((VERSION_2 / "graph.json").read_text())
    wanted = {*saved, *saved["model"], *saved["fingerprint"]}
    for block in saved["blocks"]:
        wanted |= block.keys()
        for plan in block["plans"]:
            wanted |= {*plan, *plan["guards"], *(name for node in plan["nodes"] for name in node)}
    for records in (saved["tensors"], saved["named_modules"]):
        wanted |= {name for record in records for name in record}
    wanted |= {"same_as", "frozen", "also", "device", "opaque", "chosen", "excluded", "rewrite"}
    wanted |= {"attributes", "reads", "numbers", "steps", "own", "plan", "sites", "operators"}
    names |= set(re.findall(r'[{"]"?([a-z]+)":', text))
    wanted |= {"tensor", "value", "number", "object", "items", "loose"}
    assert wanted <= names, sorted(wanted - names)
    assert f"schema {SCHEMA}" in text.lower()
