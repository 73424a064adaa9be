"""Attacks by names that mean something in the Python functions that graphs become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.storage.files import edit, guards_in, node
from tests.storage.hostile import load, refused
from tests.support.families import make_inputs

BAD = ["self", "__debug__", "__class__", "__x", "class", "None", "a b", "", "x=1", "*a", "\u00e9"]


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_no_function_can_take(name: str, saved: Path) -> None:
    def change(document: Any) -> None:
        node(document, "input_ids")["target"] = name
        inputs = guards_in(document)["arguments"]
        inputs[name] = inputs.pop("input_ids")

    edit(saved / "graph.json", change)
    refused(saved, "graph.json.blocks[0].plans[0].")


@pytest.mark.parametrize("name", BAD)
def test_the_target_of_a_placeholder_alone(name: str, saved: Path) -> None:
    edit(saved / "graph.json", lambda d: node(d, "input_ids").update(target=name))
    assert ".target: " in refused(saved, "graph.json.blocks[0].plans[0].nodes")


@pytest.mark.parametrize("name", [name for name in BAD if name != "self"])
def test_arguments_by_name(name: str, saved: Path) -> None:
    edit(saved / "graph.json", lambda d: node(d, "view").update(kwargs={name: 1}))
    refused(saved, "graph.json.blocks[0].plans[0].nodes")


@pytest.mark.parametrize("name", ["torch", "device", "inf"])
def test_nodes_that_torch_fx_would_call_otherwise(name: str, saved: Path) -> None:
    edit(saved / "graph.json", lambda d: node(d, "arange").update(name=name))
    refused(saved, f"graph.json.blocks[0].plans[0].nodes[7] ('{name}').name")


@pytest.mark.parametrize("name", ["operator", "math", "x0", "leaves"])
def test_nodes_that_are_called_what_the_code_needs(name: str, saved: Path, llama: Any) -> None:
    """torch.fx gives its own names way: such a graph computes what it says."""
    text = (saved / "graph.json").read_text(encoding="utf-8")
    text = text.replace('{"node": "arange"}', f'{{"node": "{name}"}}')
    text = text.replace('"name": "arange"', f'"name": "{name}"')
    (saved / "graph.json").write_text(text, encoding="utf-8")
    inputs = make_inputs(llama)
    assert f'"{name}"' in text and torch.equal(load(saved)(**inputs)[0], llama(**inputs)[0])
