"""Attacks through the configs, the weights, the index of shards and the report."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_fx
from liger_fx.model.block import Block
from tests.storage.files import edit
from tests.storage.hostile import refused

Change = Callable[[Any], Any]

CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "code of a hub": ({"auto_map": {"AutoModel": "evil--code.Model"}}, "config.json.auto_map"),
    "quantisation": (
        {"quantization_config": {"quant_method": "x"}},
        "config.json.quantization_config",
    ),
    "kernel of a hub": ({"attn_implementation": "evil/kernels"}, "config.json.attn_implementation"),
    "nested kernel": ({"x": {"_attn_implementation": "evil/kernels"}}, "config.json._attn"),
    "model by name": ({"backbone": "evil/model"}, "config.json.backbone"),
    "address": ({"architecture": "hf-hub:evil/model"}, "config.json.architecture"),
    "nested address": ({"x": {"y": "https://evil.example"}}, "config.json.y"),
    "many layers": ({"num_hidden_layers": 10**9}, "config.json.num_hidden_layers"),
    "too many layers": ({"num_hidden_layers": 50_000}, "config.json: asks for a larger model"),
    "wide": ({"hidden_size": 2**24}, "config.json: asks for a larger model"),
    "large vocabulary": ({"vocab_size": 2**23}, "config.json: asks for a larger model"),
    "negative": ({"hidden_size": -8}, "config.json"),
    "other size": ({"intermediate_size": 80}, "graph.json"),
    "other eps": ({"rms_norm_eps": 0.1}, "graph.json.modules"),
    "other activation": ({"hidden_act": "__import__('os')"}, "config.json"),
    "other type": ({"model_type": "gpt2"}, "config.json.model_type"),
    "path as type": ({"model_type": "../../x"}, "config.json.model_type"),
    "no type": ({"model_type": None}, "config.json.model_type"),
    "dunder": ({"__class__": "os"}, "config.json: '__class__' is no field"),
    "method": ({"to_dict": 1}, "config.json: 'to_dict' is no field"),
    "no name": ({"a b": 1}, "config.json: 'a b' is no field"),
}


@pytest.mark.parametrize("attack", CONFIG)
def test_the_config(attack: str, saved: Path) -> None:
    values, place = CONFIG[attack]
    edit(saved / "config.json", lambda config: config.update(values))
    refused(saved, place)


@pytest.mark.parametrize(
    "values", [{"custom_generate": "evil/code"}, {"compile_config": {"backend": "x"}}, {"save": 1}]
)
def test_the_generation_config(values: dict[str, Any], saved: Path) -> None:
    edit(saved / "generation_config.json", lambda config: config.update(values))
    if "save" in values:  # an unknown plain field is only a field
        liger_fx.load(saved)
    else:
        refused(saved, "generation_config.json")


def header(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """The file with its JSON header changed, its length made right."""

    def apply(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        record = json.loads(data[8 : 8 + length])
        changed = change(record)
        text = json.dumps(record if changed is None else changed).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return apply


NORM = "model.norm.weight"
WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated by a byte": (lambda d: d[:-1], "model.safetensors: has"),
    "truncated in half": (lambda d: d[: len(d) // 2], "model.safetensors: has"),
    "truncated in its header": (lambda d: d[:100], "model.safetensors: has no header"),
    "empty": (lambda d: b"", "model.safetensors: has no header"),
    "longer": (lambda d: d + b"x", "model.safetensors: has"),
    "huge header": (lambda d: struct.pack("<Q", 2**62) + d[8:], "model.safetensors: has no header"),
    "no JSON": (lambda d: d[:8] + b"\x00" + d[9:], "model.safetensors: is no JSON"),
    "pickle": (lambda d: pickle.dumps({"a": 1}) * 50, "model.safetensors"),
    "list": (header(lambda h: [h]), "model.safetensors: its header"),
    "code as dtype": (
        header(lambda h: h[NORM].update(dtype="os.system")),
        f"model.safetensors.'{NORM}'",
    ),
    "other dtype": (
        header(lambda h: h[NORM].update(dtype="I32")),
        f"model.safetensors.'{NORM}': is int32",
    ),
    "huge shape": (
        header(lambda h: h[NORM].update(shape=[2**40, 2**40])),
        f"model.safetensors.'{NORM}'",
    ),
    "negative shape": (
        header(lambda h: h[NORM].update(shape=[-56, -1])),
        f"model.safetensors.'{NORM}'",
    ),
    "other shape": (
        header(lambda h: h[NORM].update(shape=[7, 8])),
        f"model.safetensors.'{NORM}': is float32",
    ),
    "negative offset": (
        header(lambda h: h[NORM].update(data_offsets=[-224, 0])),
        f"model.safetensors.'{NORM}'",
    ),
    "offset beyond": (
        header(lambda h: h[NORM].update(data_offsets=[2**50, 2**50 + 224])),
        "model.safetensors",
    ),
    "overlap": (header(lambda h: h[NORM].update(data_offsets=[0, 224])), "model.safetensors"),
    "field": (header(lambda h: h[NORM].update(code="x")), f"model.safetensors.'{NORM}'"),
    "renamed": (
        header(lambda h: h.update({"x": h.pop(NORM)})),
        f"graph.json.tensors.'{NORM}': the weights lack it",
    ),
}


@pytest.mark.parametrize("attack", WEIGHTS)
def test_the_weights(attack: str, saved: Path) -> None:
    change, place = WEIGHTS[attack]
    file = saved / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    refused(saved, place)


def test_missing_files(saved: Path) -> None:
    for name in ("model.safetensors", "buffers.safetensors", "config.json", "report.json"):
        file = saved / name
        whole = file.read_bytes()
        file.unlink()
        refused(saved, f"{name}: cannot be read")
        file.write_bytes(whole)
    (saved / "graph.json").unlink()
    refused(saved, str(saved))


@pytest.fixture
def sharded(llama: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("liger_fx.storage.weights.SHARD_BYTES", 90_000)
    liger_fx.save(llama, tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    "name",
    [
        "../llama/model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..\\x.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "x.safetensors\x00",
        "",
        7,
    ],
)
def test_names_of_shards(name: Any, sharded: Path) -> None:
    edit(sharded / "model.safetensors.index.json", lambda d: d["weight_map"].update({NORM: name}))
    refused(sharded, "model.safetensors.index.json.weight_map")


INDEX: dict[str, tuple[Change, str]] = {
    "no map": (lambda d: d.pop("weight_map"), "model.safetensors.index.json.weight_map"),
    "a list": (lambda d: d.update(weight_map=[]), "model.safetensors.index.json.weight_map"),
    "no file": (lambda d: d["weight_map"].update(x="gone.safetensors"), "gone.safetensors: cannot"),
    "no tensor": (
        lambda d: d["weight_map"].update(x="model-00001-of-00002.safetensors"),
        "model.safetensors.index.json: 'x' is not in model-00001",
    ),
    "other file": (
        lambda d: d["weight_map"].update({NORM: "model-00001-of-00002.safetensors"}),
        "model.safetensors.index.json: 'model.norm.weight' is not in model-00001",
    ),
}


@pytest.mark.parametrize("attack", INDEX)
def test_the_index(attack: str, sharded: Path) -> None:
    change, place = INDEX[attack]
    edit(sharded / "model.safetensors.index.json", change)
    refused(sharded, place)


REPORT: dict[str, Change] = {
    "later schema": lambda d: d.update(schema=99),
    "other format": lambda d: d.update(format="x"),
    "unknown field": lambda d: d.update(code="import os"),
    "type": lambda d: d.update(sites={}),
    "site": lambda d: d["sites"][0].update(rule=7),
}


@pytest.mark.parametrize("attack", REPORT)
def test_the_report(attack: str, saved: Path) -> None:
    edit(saved / "report.json", REPORT[attack])
    refused(saved, "report.json")


def test_a_wrong_dtype_of_a_constant(saved: Path) -> None:
    file = saved / "buffers.safetensors"
    change = header(lambda h: h["model.rotary_emb.inv_freq"].update(dtype="I32"))
    file.write_bytes(change(file.read_bytes()))
    refused(saved, "buffers.safetensors.'model.rotary_emb.inv_freq': is int32")


def test_nothing_of_the_weights_is_made_before_all_was_checked(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved / "graph.json", lambda d: d["fingerprint"]["code"].update(x="0"))
    made: list[Any] = []
    monkeypatch.setattr("liger_fx.storage.stored.read_tensor", lambda *a: made.append(a))
    refused(saved, "graph.json.fingerprint")
    assert made == [] and torch.get_default_dtype() is torch.float32
