"""Attacks by names that a config's fields are set by, and by configs that take for ever to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

import liger_fx
from liger_fx.errors import LoadError
from liger_fx.storage.config import choose
from liger_fx.storage.json_file import parse
from liger_fx.storage.records import Implementations
from tests.storage.files import edit
from tests.storage.hostile import refused

EAGER = {"attention": "eager", "experts": None}


@pytest.mark.parametrize("part", ["__class__", "__dict__", "rope_parameters", "to_dict", "x", ".."])
def test_parts_that_the_config_does_not_have(part: str, saved: Path) -> None:
    before = {cls: dict(vars(cls)) for cls in (LlamaConfig, PreTrainedConfig)}
    edit(saved / "graph.json", lambda d: d["implementations"].update({part: EAGER}))
    assert "is no part of a llama config" in refused(saved, "graph.json.implementations")
    assert before == {cls: dict(vars(cls)) for cls in (LlamaConfig, PreTrainedConfig)}
    config = LlamaConfig()
    with pytest.raises(LoadError, match="has no part"):
        choose(config, {part: Implementations("eager", None)})
    assert isinstance(vars(PreTrainedConfig)["_attn_implementation"], property)
    assert "_attn_implementation" not in vars(LlamaConfig)


TABLES = {
    "another name for a field": {"attribute_map": {"pad": "__class__"}, "pad": 1},
    "parts": {"sub_configs": {"__class__": {}}},
    "parts by default": {"sub_configs_defaults": {"__class__": {}}},
    "a plan": {"base_model_fsdp_plan": {"a": "b"}},
    "a constant property": {"use_return_dict": True},
    "a dtype that is a function": {"dtype": "load"},
    "a dtype that is a module": {"torch_dtype": "hub"},
    "a nested dtype": {"x": {"dtype": "ops"}},
}


@pytest.mark.parametrize("attack", TABLES)
def test_fields_that_hide_what_the_class_has(attack: str, saved: Path) -> None:
    edit(saved / "config.json", lambda config: config.update(TABLES[attack]))
    refused(saved, "config.json")


COSTLY: dict[str, tuple[str, Callable[[], Any], str]] = {
    "labels": ("config.json", lambda: {"num_labels": 2**21}, "config.json.num_labels"),
    "layers": ("config.json", lambda: {"num_hidden_layers": 2**21}, "config.json.num_hidden"),
    "nested labels": ("config.json", lambda: {"x": {"num_labels": 2**21}}, "config.json.num_l"),
    "many lists": ("config.json", lambda: {"x": [[]] * 10**6}, "config.json: has far more lists"),
    "too long": ("config.json", lambda: {"x": "a" * 2**22}, "config.json: has 4,"),
    "generation": ("generation_config.json", lambda: {"x": [[]] * 10**6}, "generation_config"),
    "long generation": (
        "generation_config.json",
        lambda: {"x": [1] * 2**21},
        "generation_config.json: has 6,",
    ),
    "long report": ("report.json", lambda: {"x": "a" * 2**26}, "report.json: has 67,"),
}


@pytest.mark.parametrize("attack", COSTLY)
def test_files_that_would_take_minutes_are_refused(attack: str, saved: Path) -> None:
    file, values, place = COSTLY[attack]
    edit(saved / file, lambda config: config.update(values()))
    refused(saved, place)


def test_a_field_twice_among_many_is_found() -> None:
    text = "{" + ", ".join(f'"a{i}": 1' for i in range(100_000)) + ', "a99999": 2}'
    with pytest.raises(LoadError, match="the field 'a99999' twice"):
        parse(text.encode())


def test_a_classifier_of_many_labels_is_read(saved: Path) -> None:
    labels = {str(i): f"LABEL_{i}" for i in range(60_000)}
    edit(saved / "config.json", lambda c: c.update(id2label=labels))
    assert len(json.dumps(labels)) > 10**6
    with pytest.raises(LoadError, match="graph.json.modules"):  # but the graph's had two
        liger_fx.load(saved)
