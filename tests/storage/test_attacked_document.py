"""Attacks on everything else in graph.json, and files that are no JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.storage.files import edit, guards_in, plan_in
from tests.storage.hostile import refused

Change = Callable[[Any], Any]


def put(record: Any, **values: Any) -> None:
    record.update(values)


DOCUMENT: dict[str, tuple[Change, str]] = {
    "later schema": (lambda d: put(d, schema=3, new="x"), "graph.json.schema: is 3, of a later"),
    "earlier schema": (lambda d: put(d, schema=1), "graph.json.schema: is 1, which liger_fx 0.1"),
    "schema as text": (lambda d: put(d, schema="1"), "graph.json.schema"),
    "other format": (lambda d: put(d, format="onnx"), "graph.json.format"),
    "unknown field": (
        lambda d: put(d, code="import os"),
        "graph.json: has the unknown field 'code'",
    ),
    "missing field": (lambda d: d.pop("tensors"), "graph.json.tensors: is missing"),
    "no object": (lambda d: [d], "graph.json: is a list"),
    "no plans": (lambda d: put(d["blocks"][0], plans=[]), "graph.json.blocks: there is no graph"),
    "many plans": (
        lambda d: put(d["blocks"][0], plans=[plan_in(d)] * 17),
        "graph.json.blocks[0].plans: are 17, more than 16",
    ),
    "class of Python": (lambda d: put(d["model"], **{"class": "os"}), "graph.json.model.class"),
    "no model class": (lambda d: put(d["model"], **{"class": "Trainer"}), "graph.json.model.class"),
    "base class": (
        lambda d: put(d["model"], **{"class": "PreTrainedModel"}),
        "graph.json.model.class",
    ),
    "auto class": (lambda d: put(d["model"], **{"class": "AutoModel"}), "graph.json.model.class"),
    "another class": (
        lambda d: put(d["model"], **{"class": "MistralForCausalLM"}),
        "graph.json.model.class",
    ),
    "another head": (
        lambda d: put(d["model"], **{"class": "LlamaForSequenceClassification"}),
        "graph.json.modules",
    ),
    "another type": (lambda d: put(d["model"], model_type="gpt2"), "config.json.model_type"),
    "device": (lambda d: put(d, device="cpu; rm"), "graph.json.device"),
    "implementation": (
        lambda d: put(d["implementations"][""], attention="kernels-community/x"),
        "graph.json.implementations",
    ),
    "module twice": (lambda d: d["modules"].append(d["modules"][0]), "graph.json.modules"),
    "module gone": (lambda d: d["modules"].pop(), "graph.json.modules"),
    "module path": (
        lambda d: d["modules"][3].__setitem__(0, "a.__class__"),
        "graph.json.modules[3]",
    ),
    "other module": (lambda d: d["modules"][3].__setitem__(2, "0" * 16), "graph.json.modules"),
    "modes": (lambda d: put(d, other_modes=["__class__"]), "graph.json.other_modes"),
    "named class": (
        lambda d: put(d["named_modules"][0], **{"class": "Linear"}),
        "graph.json.named_modules[0].class",
    ),
    "named option": (
        lambda d: put(d["named_modules"][0]["options"], code=1),
        "graph.json.named_modules[0].options",
    ),
    "option's type": (
        lambda d: put(d["named_modules"][0]["options"], cast=["input"]),
        "graph.json.named_modules[0].options.cast",
    ),
    "option's value": (
        lambda d: put(d["named_modules"][0]["options"], heads_dim=7),
        "graph.json.named_modules[0].options",
    ),
    "named twice": (
        lambda d: d["named_modules"].append(d["named_modules"][0]),
        "graph.json.named_modules[",
    ),
    "named over a method": (
        lambda d: put(d["named_modules"][0], path="model.forward"),
        "graph.json.named_modules[0].path",
    ),
    "named in nothing": (
        lambda d: put(d["named_modules"][0], path="model.gone.x"),
        "graph.json.named_modules[0].path",
    ),
    "named dunder": (
        lambda d: put(d["named_modules"][0], path="model.__init__"),
        "graph.json.named_modules[0].path",
    ),
    "children": (
        lambda d: put(d["named_modules"][1], children=["act_fn"]),
        "graph.json.named_modules[1]",
    ),
    "huge tensor": (
        lambda d: put(d["tensors"][0], shape=[2**40, 2**40]),
        "model.safetensors.'model.embed_tokens.weight'",
    ),
    "negative tensor": (
        lambda d: put(d["tensors"][0], shape=[-1, 56]),
        "graph.json.tensors[0].shape",
    ),
    "other dtype": (
        lambda d: put(d["tensors"][0], dtype="float16"),
        "model.safetensors.'model.embed_tokens.weight'",
    ),
    "no dtype": (lambda d: put(d["tensors"][0], dtype="object"), "graph.json.tensors[0].dtype"),
    "tensor twice": (lambda d: d["tensors"].append(d["tensors"][0]), "graph.json.tensors["),
    "tensor path": (
        lambda d: put(d["tensors"][0], path="a.__dict__"),
        "graph.json.tensors[0].path",
    ),
    "tensor gone": (lambda d: d["tensors"].pop(0), "model.safetensors.'model.embed_tokens.weight'"),
    "tie to a later one": (
        lambda d: d["tensors"].insert(
            0, {"path": "x", "kind": "parameter", "same_as": "lm_head.weight"}
        ),
        "graph.json.tensors[0].same_as",
    ),
    "placeholders late": (
        lambda d: plan_in(d)["nodes"].insert(5, plan_in(d)["nodes"].pop(1)),
        "graph.json.blocks[0].plans[0].nodes",
    ),
    "two outputs": (
        lambda d: plan_in(d)["nodes"].insert(-1, {**plan_in(d)["nodes"][-1], "name": "out"}),
        "graph.json.blocks[0].plans[0].nodes",
    ),
    "no output": (lambda d: plan_in(d)["nodes"].pop(), "graph.json.blocks[0].plans[0].nodes"),
    "no nodes": (lambda d: put(plan_in(d), nodes=[]), "graph.json.blocks[0].plans[0].nodes"),
    "input unguarded": (
        lambda d: guards_in(d)["arguments"].pop("attention_mask"),
        "graph.json.blocks[0].plans[0].nodes",
    ),
    "selection": (
        lambda d: put(d, selection={"chosen": "all", "excluded": []}),
        "graph.json.selection",
    ),
}


@pytest.mark.parametrize("attack", DOCUMENT)
def test_the_document(attack: str, saved: Path) -> None:
    change, place = DOCUMENT[attack]

    def apply(document: Any) -> Any:
        changed = change(document)
        return changed if attack == "no object" else None

    edit(saved / "graph.json", apply)
    refused(saved, place)


TEXTS = {
    "not a number": b'{"schema": NaN}',
    "infinite": b'{"schema": 1e999}',
    "many digits": b'{"schema": ' + b"9" * 10_000 + b"}",
    "a field twice": b'{"schema": 1, "schema": 2}',
    "deep": b"[" * 100_000,
    "deep and whole": b"[" * 5_000 + b"]" * 5_000,
    "nested": b"[" * 200 + b"]" * 200,
    "not UTF-8": b'{"a": "\xff"}',
    "empty": b"",
    "pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
}


@pytest.mark.parametrize("file", ["graph.json", "config.json", "report.json"])
@pytest.mark.parametrize("attack", TEXTS)
def test_what_is_no_json(attack: str, file: str, saved: Path) -> None:
    (saved / file).write_bytes(TEXTS[attack])
    refused(saved, file)
