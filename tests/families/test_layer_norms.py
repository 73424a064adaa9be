"""The families whose norms are LayerNorms: how many are rewritten, and that they compute the same.

Norms before each block (gpt2, opt, vit, whisper), after it (bert, bart), once for attention and MLP
(phi, cohere), written out (cohere) and without weights (olmo).
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification

import liger_fx
from liger_fx.inputs import example_inputs
from liger_fx.tiny import tiny_model
from tests.programs.models import tiny
from tests.support.accuracy import Judge, Run, float64_copy, measure
from tests.support.pairs import mode

# family: norms alone, norms of a sum, and sums that are refused (one part is broadcast)
SITES = {
    "gpt2": (3, 2, 0),
    "opt": (5, 0, 0),  # the sum is flattened before the second norm of a layer
    "bert": (2, 4, 1),  # the embeddings' norm and the head's
    "vit": (3, 2, 0),
    "phi": (3, 0, 0),
    "stablelm": (3, 2, 0),
    "cohere": (3, 0, 0),
    "nemotron": (3, 2, 0),  # 1 + weight
    "olmo": (3, 2, 0),
    "bart": (1, 11, 1),
    "whisper": (6, 6, 0),
}
ENCODER_DECODER = ("bart", "whisper")
DRAWS = 3
ROUNDING = 3e-6


def build(name: str) -> Any:
    """A tiny model that gives a loss."""
    if name in ENCODER_DECODER:
        return tiny(name)
    if name == "vit":
        return ViTForImageClassification(tiny_model(name, layers=2).config)
    return tiny_model(name, layers=2)


@functools.cache
def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build(name).to(dtype).eval()
    return model, liger_fx.optimize(model)


def calls(model: nn.Module) -> list[dict[str, Any]]:
    found = []
    for batch, length in ((2, 9), (1, 5), (3, 12)):
        for seed in range(DRAWS):
            inputs = example_inputs(model, batch, length, seed)
            found.append({"labels": torch.arange(batch) % 2} | inputs)  # of pictures, two classes
    return found


def same(ours: Run, theirs: Run, exact: Run | None = None) -> bool:
    """Each tensor to rounding, to less than that of all gradients (that of a key's bias is zero but
    for rounding), or to what the original itself is off by (a bias's, summed over many rows)."""
    noise = 1e-9 * sum(float(g.norm()) for g in theirs.gradients.values())
    for kind in ("outputs", "gradients"):
        for name, b in getattr(theirs, kind).items():
            true = b if exact is None else getattr(exact, kind)[name]
            limit = ROUNDING * b.norm() + noise + 2 * (b - true).norm()
            if (getattr(ours, kind)[name] - b).norm() > limit:
                return False
    return True


@pytest.mark.parametrize("name", SITES)
def test_number_of_sites(name: str) -> None:
    _, opt = pair(name)
    alone, of_sums, refused = SITES[name]
    found = Counter(site.rule for site in opt.report.rewritten)
    assert (found["layer_norm"], found["add_layer_norm"]) == (alone, of_sums)
    told = [s.reason for s in opt.report.refused if "norm" in s.rule]
    assert len(told) == refused and all("is added, and the sum is" in reason for reason in told)
    kinds = Counter(type(m).__name__ for m in opt.modules() if "LayerNorm" in type(m).__name__)
    assert kinds == Counter(LigerLayerNorm=alone, LigerAddLayerNorm=of_sums) - Counter()


@pytest.mark.parametrize("name", SITES)
def test_float32_and_every_gradient(name: str) -> None:
    model, opt = pair(name)
    judge, exact = Judge(), float64_copy(model)
    for inputs in calls(model):
        theirs, ours = measure(model, inputs), measure(opt, inputs)
        true = measure(exact, inputs, float64=True)
        assert same(ours, theirs, true)
        judge.add(true, theirs, ours)
    assert judge.faults() == []


@pytest.mark.parametrize("name", SITES)
def test_bfloat16(name: str) -> None:
    model, opt = pair(name, torch.bfloat16)
    judge, exact = Judge(), float64_copy(model)
    for inputs in calls(model):
        runs = (measure(m, inputs) for m in (model, opt))
        judge.add(measure(exact, inputs, float64=True), *runs)
    assert judge.faults() == []


@pytest.mark.parametrize("name", ["gpt2", "bert", "cohere"])
def test_bfloat16_autocast(name: str) -> None:
    model, opt = pair(name)
    judge, exact = Judge(), float64_copy(model)
    for inputs in calls(model):
        runs = (measure(m, inputs, autocast=torch.bfloat16) for m in (model, opt))
        judge.add(measure(exact, inputs, float64=True), *runs)
    assert judge.faults() == []


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_dropout_before_the_sum_drops_the_same(name: str) -> None:
    model, opt = pair(name)
    inputs = example_inputs(model, 2, 9)
    with mode(True, model, opt):
        runs = []
        for one in (model, opt):
            torch.manual_seed(0)
            runs.append(measure(one, inputs))
        assert same(runs[1], runs[0])
    assert not same(measure(model, inputs), runs[0]), "it dropped something"


@pytest.mark.parametrize("name", ["gpt2", "bert", "cohere"])
def test_saved_written_as_source_flattened_and_verified(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = pair(name)
    inputs = example_inputs(model, 2, 9)
    inputs.pop("labels", None)
    expected = opt(**inputs).logits
    liger_fx.save(opt, tmp_path / "saved")
    loaded = liger_fx.load(tmp_path / "saved")
    assert torch.equal(loaded(**inputs).logits, expected)
    assert str(loaded) == str(opt) and list(loaded.state_dict()) == list(model.state_dict())
    liger_fx.to_folder(opt, tmp_path / f"{name}_source")
    monkeypatch.syspath_prepend(tmp_path)
    source = importlib.import_module(f"{name}_source").load()
    assert torch.equal(source(**inputs).logits, expected)
    flat = liger_fx.flatten(opt)
    assert torch.equal(flat(**inputs).logits, expected)
    alone, of_sums, _ = SITES[name]
    called = Counter(
        type(flat.get_submodule(node.target)).__name__
        for node in flat.graph.nodes
        if node.op == "call_module"
    )
    assert (called["LigerLayerNorm"], called["LigerAddLayerNorm"]) == (alone, of_sums)
    found = liger_fx.verify(model, opt)
    assert found.ok, str(found)
    checked = Counter(site.class_name for site in found.sites)
    assert checked["LigerLayerNorm"] + checked["LigerAddLayerNorm"] == alone + of_sums
