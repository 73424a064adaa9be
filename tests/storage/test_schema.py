"""Schema version 1, kept as a file: every later version reads it, or says which one does."""

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

VERSION_1 = Path(__file__).parent / "schema_1"
DOCS = ROOT / "docs" / "graph-format.md"


def test_version_1_is_read() -> None:
    found = read_saved(VERSION_1)
    plan = found.plans[0]
    assert found.document.model.class_ == "LlamaForCausalLM" and len(found.plans) == 1
    assert len(plan.graph.nodes) == 56 and plan.followed[:2] == ["", "model"]
    assert [record.class_ for record in found.document.named_modules] == [
        "LigerRotaryEmbedding", "LigerSwiGLUMLP", "LigerRMSNorm", "LigerRMSNorm", "LigerRMSNorm",
    ]  # fmt: skip
    assert plan.guards.call.tensors["input_ids"].sizes == ("batch", "sequence")
    assert found.reports[0] is not None and len(found.reports[0].rewritten) == 5


def test_version_1_loads_or_says_what_changed() -> None:
    saved = json.loads((VERSION_1 / "graph.json").read_text())
    given = safetensors.torch.load_file(VERSION_1.parent / "schema_1_call.safetensors")
    try:
        opt = liger_fx.load(VERSION_1)
    except LoadError as error:
        version = saved["fingerprint"]["versions"]["transformers"]
        assert "has changed" in str(error) and f"transformers {version}, here" in str(error)
        return
    logits = opt(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(logits, given["logits"])
    assert len(opt.plans) == 1


@pytest.mark.parametrize("schema", [2, 99])
def test_a_later_version_says_so_before_anything_else(schema: int, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(VERSION_1, tmp_path / "graph"))
    edit(folder / "graph.json", lambda d: {"format": d["format"], "schema": schema, "new": []})
    with pytest.raises(
        LoadError, match=rf"schema: is {schema}, of a later liger_fx.*versions up to 1"
    ):
        liger_fx.load(folder)


def test_the_documentation_has_every_field() -> None:
    text = DOCS.read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+)`", text))
    saved = json.loads((VERSION_1 / "graph.json").read_text())
    plan = saved["blocks"][0]["plans"][0]
    wanted = {*saved, *saved["model"], *saved["fingerprint"], *plan, *plan["guards"]}
    for records in (plan["nodes"], saved["tensors"], saved["named_modules"]):
        wanted |= {name for record in records for name in record}
    wanted |= {"same_as", "frozen", "also", "device", "opaque", "chosen", "excluded", "rewrite"}
    assert wanted <= names, sorted(wanted - names)
    assert f"schema {SCHEMA}" in text.lower() or f"`schema`: {SCHEMA}" in text
