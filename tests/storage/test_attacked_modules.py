"""Attacks on what a file says of modules: widths, modes, paths, rules, sites of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.storage.files import edit, node, plan_in
from tests.storage.hostile import refused


def named(document: Any, kind: str) -> Any:
    return next(r for r in document["named_modules"] if r["class"] == kind)


@pytest.mark.parametrize("width", [10**18, 57, 0, -56, 2**24 - 1])
def test_a_width_that_is_not_the_weights(width: int, saved: Path) -> None:
    def change(document: Any) -> None:
        named(document, "LigerRMSNorm")["options"]["width"] = width

    edit(saved / "graph.json", change)
    refused(saved, r"graph.json.named_modules[2].options.width: ")


@pytest.mark.parametrize("name, value", [("head_dim", 17), ("rotary_dim", 18), ("head_dim", 2**40)])
def test_rotary_widths_that_are_not_the_graphs(name: str, value: int, saved: Path) -> None:
    def change(document: Any) -> None:
        options = named(document, "LigerRotaryEmbedding")["options"]
        assert options[name] == 16
        options[name] = value

    edit(saved / "graph.json", change)
    text = refused(saved, "graph.json.")
    assert "rotary_embedding" in text or "head_dim" in text


def follow(document: Any) -> None:
    plan_in(document)["followed"][1] = "model.nothing"


def follow_a_mounted_one(document: Any) -> None:
    plan_in(document)["followed"].append("model.layers.0.self_attn.rotary_embedding")


def mode(document: Any) -> None:
    document["other_modes"] = ["model.layers.0", "model.layers.7"]


def choose(document: Any) -> None:
    document["selection"]["chosen"] = ["rms_norm", "rms_nrom"]


def exclude(document: Any) -> None:
    document["selection"]["excluded"] = ["model.layers.9"]


def choose_a_lot(document: Any) -> None:
    document["selection"]["excluded"] = ["rms_norm"] * 10_000


@pytest.mark.parametrize(
    "change, place",
    [
        (follow, "graph.json.blocks[0].plans[0].followed[1]: there is no module model.nothing"),
        (follow_a_mounted_one, "graph.json.blocks[0].plans[0].followed["),
        (mode, "graph.json.other_modes[1]: there is no module model.layers.7"),
        (choose, "graph.json.selection: 'rms_nrom' is no rule and no module"),
        (choose_a_lot, "graph.json.selection: has more than 4096 names"),
        (exclude, "graph.json.selection: 'model.layers.9' is no rule"),
    ],
)
def test_names_of_nothing(change: Callable[[Any], None], place: str, saved: Path) -> None:
    edit(saved / "graph.json", change)
    refused(saved, place)


@pytest.mark.parametrize("site", [-1, 99, 10**18, 4])
def test_a_site_that_the_plan_lacks(site: int, saved: Path) -> None:
    def change(document: Any) -> None:
        made = node(document, "model.norm")
        assert made["rewrite"]["site"] != site
        made["rewrite"]["site"] = site
        if site == 4:
            made["rewrite"]["rule"] = "rope"

    edit(saved / "graph.json", change)
    text = refused(saved, "graph.json.blocks[0].plans[0].nodes[")
    assert f".rewrite.site: the plan has no site {site}" in text


def test_modules_that_are_described_wrongly(saved: Path) -> None:
    before = (saved / "graph.json").read_text()
    for index, value in ((1, None), (2, []), (2, {"eps": 1.0}), (0, 3)):

        def change(document: Any, index: int = index, value: Any = value) -> None:
            document["modules"][3][index] = value

        edit(saved / "graph.json", change)
        refused(saved, f"graph.json.modules[3][{index}]")
        (saved / "graph.json").write_text(before)


def test_an_attribute_of_a_replaced_module(saved: Path) -> None:
    def change(document: Any) -> None:
        norm = next(m for m in document["modules"] if m[0] == "model.norm")
        assert norm[2] == {"variance_epsilon": "1e-06"}
        norm[2]["variance_epsilon"] = "1.0"

    edit(saved / "graph.json", change)
    text = refused(saved, "graph.json.modules[")
    assert "attribute variance_epsilon is 1e-06 in the model, 1.0 here" in text
