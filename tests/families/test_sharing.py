"""Promises 1 and 2: shared weights, the given model as it was, and a result that is a model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from transformers import AutoModelForCausalLM, PreTrainedModel

import liger_fx
from tests.support.accuracy import furthest, measure
from tests.support.families import FAMILIES, build, make_inputs
from tests.support.pairs import fresh, pair
from tests.support.untouched import Untouched

ROOT = Path(__file__).resolve().parents[2]


def logits(model: Any, **shape: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs(model, 2, 9, pad=True)).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_given_model_is_untouched(name: str) -> None:
    model = build(name)
    inputs = make_inputs(model, 2, 9, pad=True, labels=True)
    first = measure(model, inputs)
    before = Untouched(model)
    opt = liger_fx.optimize(model, inputs=inputs)
    assert before.changes() == []
    measure(opt, inputs)
    opt.train()
    opt(**inputs)
    opt.eval().generate(inputs["input_ids"], max_new_tokens=2)
    assert before.changes() == []
    again = measure(model, inputs)
    assert all(torch.equal(first.outputs[k], again.outputs[k]) for k in first.outputs)
    assert all(torch.equal(first.gradients[k], again.gradients[k]) for k in first.gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_and_ties(name: str) -> None:
    model, opt = pair(name)
    theirs, ours = model.state_dict(), opt.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert ours[key].data_ptr() == tensor.data_ptr(), f"{key} is not shared"
    assert [n for n, _ in opt.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (_, mine), (path, parameter) in zip(
        opt.named_parameters(), model.named_parameters(), strict=True
    ):
        assert mine is parameter, f"{path} is another Parameter"
    buffers = dict(model.named_buffers())
    assert dict(opt.named_buffers()).keys() == buffers.keys()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (opt.get_input_embeddings().weight is opt.get_output_embeddings().weight)
    assert tied == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_a_graph_module_and_the_users_model(name: str) -> None:
    model, opt = pair(name)
    assert isinstance(opt, fx.GraphModule)
    assert isinstance(opt, PreTrainedModel) and isinstance(opt, type(model))
    assert type(opt).__name__ == type(model).__name__
    assert opt.config.to_dict() == model.config.to_dict()
    assert opt.device == model.device and opt.dtype == model.dtype
    assert opt.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("name", FAMILIES)
def test_deepcopy_and_pickle(name: str) -> None:
    model, opt = pair(name)
    expected = logits(opt)
    stored = io.BytesIO()
    torch.save(opt, stored)
    stored.seek(0)
    copies = (
        copy.deepcopy(opt),
        pickle.loads(pickle.dumps(opt)),
        torch.load(stored, weights_only=False),
    )
    for twin in copies:
        assert torch.equal(logits(twin), expected)
        assert [type(m).__name__ for m in twin.modules()] == [
            type(m).__name__ for m in opt.modules()
        ]
        assert twin.report.sites == opt.report.sites
        weight = twin.get_output_embeddings().weight
        assert weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
        with torch.no_grad():
            weight.mul_(2)
        assert not torch.equal(logits(twin), expected), "the copy computes with its own weights"
    assert torch.equal(logits(opt), expected)


def test_pickle_is_read_by_another_process(tmp_path: Path) -> None:
    _, opt = pair("gemma2")
    path = tmp_path / "opt.pickle"
    path.write_bytes(pickle.dumps((opt, logits(opt))))
    script = (
        "import pickle, sys, torch; from tests.support.families import make_inputs\n"
        "torch.set_num_threads(1)\n"
        "opt, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad(): got = opt(**make_inputs(opt, 2, 9, pad=True)).logits\n"
        "assert torch.equal(got, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pretrained(name: str, tmp_path: Path) -> None:
    model, opt = pair(name)
    opt.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for kind in ("ours", "theirs"):
        back = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        assert type(back) is type(model)
        assert torch.equal(logits(back), logits(model))
    files = [sorted(p.name for p in (tmp_path / k).iterdir()) for k in ("ours", "theirs")]
    assert files[0] == files[1]
    config = [(tmp_path / k / "config.json").read_text() for k in ("ours", "theirs")]
    assert config[0] == config[1]


def test_modes_are_apart() -> None:
    model, opt = fresh("llama")
    opt.train()
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in opt.modules())
    model.train()
    opt.eval()
    assert all(m.training for m in model.modules())


def test_hooks_and_attributes_are_apart() -> None:
    model, opt = fresh("llama")
    calls: list[str] = []
    opt.register_forward_hook(lambda *_: calls.append("opt"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # hooks of the model itself are no reason to fall back
        logits(opt)
    assert calls == ["opt"]
    opt.config.use_cache = False
    assert model.config.use_cache


def test_a_step_on_one_is_a_step_on_the_other() -> None:
    """The weights are the same objects: training the result trains the model that was given."""
    model, opt = fresh("llama")
    inputs = make_inputs(model, 2, 9, labels=True)
    optimizer = torch.optim.SGD(opt.parameters(), lr=0.5)
    before = logits(model)
    opt(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert not torch.equal(logits(model), before)
    assert furthest(measure(opt, inputs), measure(model, inputs)) < 3e-6


def test_two_results_side_by_side() -> None:
    model = build("qwen3")
    whole = liger_fx.optimize(model)
    norms = liger_fx.optimize(model, rules=["rms_norm"])
    assert {site.rule for site in norms.report.rewritten} == {"rms_norm"}
    assert {site.rule for site in whole.report.rewritten} > {"rms_norm"}
    inputs = make_inputs(model, 2, 9, labels=True)
    theirs = measure(model, inputs)
    for opt in (whole, norms, liger_fx.trace(model)):
        assert furthest(measure(opt, inputs), theirs) < 3e-6
    del whole
    assert furthest(measure(norms, inputs), theirs) < 3e-6
    with pytest.raises(liger_fx.LigerFxError):
        liger_fx.optimize(norms)


def test_exclude_leaves_sites_alone() -> None:
    model = build("llama")
    opt = liger_fx.optimize(model, exclude=["model.layers.0", "rotary_embedding"])
    paths = {site.path for site in opt.report.rewritten}
    assert "model.layers.1.input_layernorm" in paths
    assert not any(path.startswith("model.layers.0.") for path in paths)
    assert "rotary_embedding" not in {site.rule for site in opt.report.rewritten}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_moving_to_another_dtype(dtype: torch.dtype) -> None:
    """The trace froze float32 casts: after .to() the calls are traced anew, never wrong."""
    model, opt = fresh("gemma3_text")
    logits(opt)
    twin, reference = copy.deepcopy(opt).to(dtype), copy.deepcopy(model).to(dtype)
    got, want = logits(twin), logits(reference)
    assert got.dtype == want.dtype == dtype
    bound = 0.03 if dtype is torch.bfloat16 else 3e-6
    assert (got - want).norm() / want.norm() < bound
