"""What is rewritten in each held family: the exact number of sites per rule, all explained.

The numbers follow from the models' code: a norm before attention, before the MLP and at the end
(2 per layer + 1), plus norms after them, norms on q and k, or norms inside a low-rank projection.
The norm before the MLP is that of a sum made in the same layer (1 per layer), but where norms stand
only after each block.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import liger_fx
from tests.support.families import FAMILIES, make_inputs
from tests.support.pairs import pair

# family: sites rewritten per rule, in the tiny models of tests/support/families.py
RMS, ADD, ROTARY, MLP = "rms_norm", "add_rms_norm", "rotary_embedding", "gated_mlp"
EXPERTS = "experts"
LAYER, QK = "layer_norm", "qk_norm_rotary"  # q_norm, k_norm and the turn of both
SITES: dict[str, dict[str, int]] = {
    "llama": {RMS: 3, ADD: 2, ROTARY: 2, MLP: 2},
    "mistral": {RMS: 3, ADD: 2, ROTARY: 2, MLP: 2},
    "qwen2": {RMS: 3, ADD: 2, ROTARY: 2, MLP: 2},
    "qwen3": {RMS: 3, ADD: 2, QK: 2, MLP: 2},
    "gemma": {RMS: 3, ADD: 2, ROTARY: 2, MLP: 2},
    "gemma2": {RMS: 7, ADD: 2, ROTARY: 2, MLP: 2},  # + a norm after each block
    "gemma3_text": {RMS: 7, ADD: 2, QK: 2, MLP: 2},  # + a norm after each block
    "phi3": {RMS: 3, ADD: 2, ROTARY: 2, MLP: 2},
    "glm4": {RMS: 7, ADD: 2, ROTARY: 2, MLP: 2},  # + a norm after each block
    "olmo2": {RMS: 9, ROTARY: 2, MLP: 2},  # only after each block; q_norm, k_norm
    "cohere2": {LAYER: 5, ROTARY: 3, MLP: 4},  # the layer of full attention is NoPE
    "granite": {RMS: 3, ADD: 2, ROTARY: 2, MLP: 2},
    "smollm3": {RMS: 5, ADD: 4, ROTARY: 3, MLP: 4},  # the fourth layer is NoPE
    # + q_a, kv_a; one MLP is the shared expert
    "deepseek_v3": {RMS: 7, ADD: 2, ROTARY: 2, MLP: 2, EXPERTS: 1},
    "mixtral": {RMS: 3, ADD: 2, ROTARY: 2, EXPERTS: 2},
}

GELU = ("gemma", "gemma2", "gemma3_text")


def test_the_table_lists_every_family() -> None:
    assert tuple(SITES) == FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_number_of_sites(name: str) -> None:
    model, opt = pair(name)
    opt(**make_inputs(model, pad=True, labels=True))
    found = Counter(site.rule for site in opt.report.rewritten)
    assert found == {**SITES[name], "linear_cross_entropy": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_site_is_left_unexplained(name: str) -> None:
    model, opt = pair(name)
    assert not opt.report.refused
    norms, mlps = expected_paths(model)
    answered = {site.path for site in opt.report.sites}
    norms -= of_heads(name, norms)
    assert norms | mlps <= answered, "a norm or MLP of the model is in neither list"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_module_is_opaque(name: str) -> None:
    _, opt = pair(name)
    assert not opt.report.opaque


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tree_tells_the_truth(name: str) -> None:
    model, opt = pair(name)
    tree = {path: type(module).__name__ for path, module in opt.named_modules()}
    norms, mlps = expected_paths(model)
    mlp_class = "LigerGEGLUMLP" if name in GELU else "LigerSwiGLUMLP"
    for path in of_heads(name, norms):
        assert tree[path] == type(model.get_submodule(path)).__name__, "only its weight is used"
        norms.remove(path)
    norm_classes = Counter(tree[path] for path in norms)
    added = SITES[name].get(ADD, 0)
    assert norm_classes.pop("LigerAddRMSNorm", 0) == added
    alone = "LigerLayerNorm" if LAYER in SITES[name] else "LigerRMSNorm"
    assert norm_classes == {alone: len(norms) - added}
    assert {tree[path] for path in mlps} <= {mlp_class}
    for path, module in model.named_modules():
        if path.count(".") == 2 and path.startswith("model.layers."):
            assert tree[path] == type(module).__name__, "containers keep their class names"
    printed = str(opt)
    for class_name in {site.after_class for site in opt.report.rewritten}:
        assert f"{class_name}(" in printed


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_name_nodes_of_the_graph(name: str) -> None:
    model, opt = pair(name)
    flat = liger_fx.flatten(opt)
    called = {f"call_module {node.target}" for node in flat.graph.nodes if node.op == "call_module"}
    classes = {type(module).__name__ for module in model.modules()}
    for site in opt.report.rewritten:
        if site.rule == "linear_cross_entropy":  # of another call, with labels
            continue
        assert site.after in called
        assert type(opt.get_submodule(site.after.removeprefix("call_module "))).__name__ == (
            site.after_class
        )
        assert site.before_class in classes
        assert site.before, "the nodes it replaced are named"
        assert site.source is not None and site.source[0].endswith(".py")
    flat.graph.lint()


def of_heads(name: str, norms: set[str]) -> set[str]:
    """The norms that are part of a site of their attention's, and no module in the graph."""
    return (
        {path for path in norms if path.endswith(("q_norm", "k_norm"))}
        if QK in SITES[name]
        else set()
    )


def expected_paths(model: Any) -> tuple[set[str], set[str]]:
    """Paths of the model's norms, and of its MLPs other than experts, by the names of classes."""
    norms, mlps = set(), set()
    for path, module in model.named_modules():
        class_name = type(module).__name__
        if class_name.endswith("Norm"):
            norms.add(path)
        elif class_name.endswith("MLP"):
            mlps.add(path)
    return norms, mlps
