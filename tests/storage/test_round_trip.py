"""What load gives is what was saved: outputs, tree, graphs, guards, and the files themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import liger_fx
from liger_fx.model.block import Block
from tests.storage.files import contents
from tests.support.families import FAMILIES, build, make_inputs


def graph_facts(opt: Block) -> list[Any]:
    """Every node of every plan, and the guards in words."""
    return [
        (
            [
                (n.name, n.op, n.target, str(n.args), str(n.kwargs), n.meta.get("module", ""))
                for n in plan.graph.nodes
            ],
            plan.guards,
            plan.paths,
            plan.opaque,
        )
        for plan in opt.plans
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_model_comes_back(name: str, tmp_path: Path) -> None:
    opt = liger_fx.optimize(build(name))
    inputs = make_inputs(opt, pad=True)
    opt(input_ids=inputs["input_ids"])  # a second kind of call
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    assert graph_facts(loaded) == graph_facts(opt) and len(loaded.plans) == 2
    ours, theirs = loaded(**inputs), opt(**inputs)
    assert type(ours) is type(theirs) and torch.equal(ours.logits, theirs.logits)
    assert len(loaded.plans) == 2  # no call was traced
    assert str(loaded) == str(opt) and loaded.report == opt.report
    assert list(loaded.state_dict()) == list(opt.state_dict())
    assert type(loaded).__mro__[2:] == type(opt).__mro__[2:]
    liger_fx.save(loaded, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_specs_sources_and_rewrites_of_nodes_come_back(llama: Block, saved: Path) -> None:
    ours = liger_fx.load(saved).graph.nodes
    for new, old in zip(ours, llama.graph.nodes, strict=True):
        assert new.meta.get("source") == old.meta.get("source")
        assert new.meta.get("rewrite") == old.meta.get("rewrite")
        assert ("spec" in new.meta) == ("spec" in old.meta)
        if "spec" in old.meta:
            assert new.meta["spec"].dtype == old.meta["spec"].dtype
    named = {str(node.meta["spec"]) for node in ours if "spec" in node.meta}
    assert "float32[batch, sequence, 56]" in named


def test_it_generates_the_same_tokens(llama: Block, saved: Path) -> None:
    prompt = make_inputs(llama, 1, 5)["input_ids"]
    ours, theirs = (
        m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (liger_fx.load(saved), llama)
    )
    assert torch.equal(ours, theirs)


def test_it_trains_on(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama")).train()
    inputs = make_inputs(opt, labels=True)
    opt(**inputs)
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    assert loaded.training and all(module.training for module in loaded.modules())
    for model in (opt, loaded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    for (path, ours), theirs in zip(loaded.named_parameters(), opt.parameters(), strict=True):
        assert torch.equal(ours, theirs), path
        assert not torch.equal(ours, torch.zeros_like(ours))


def test_further_kinds_of_call_are_traced_with_the_same_selection(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"), exclude=["rms_norm", "model.layers.1"])
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    inputs = make_inputs(opt, labels=True)
    assert torch.equal(loaded(**inputs).loss, opt(**inputs).loss)
    assert len(loaded.plans) == 2
    assert graph_facts(loaded) == graph_facts(opt) and str(loaded) == str(opt)
    assert loaded.report == opt.report


def test_a_plain_trace_comes_back_as_one(tmp_path: Path) -> None:
    traced = liger_fx.trace(build("llama", num_hidden_layers=1))
    liger_fx.save(traced, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    inputs = make_inputs(traced)
    assert loaded.report is None and torch.equal(loaded(**inputs).logits, traced(**inputs).logits)
    loaded(**make_inputs(traced, labels=True))
    assert "Liger" not in str(loaded) and loaded.report is None and len(loaded.plans) == 2
    assert not list((tmp_path / "a").glob("report*"))


def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("qwen2"))
    liger_fx.save(opt, tmp_path / "a")
    written = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    assert "model.embed_tokens.weight" in written and "lm_head.weight" not in written
    loaded = liger_fx.load(tmp_path / "a")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert len(list(loaded.parameters())) == len(list(opt.parameters()))


def test_transformers_reads_the_directory(llama: Block, saved: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved)
    inputs = make_inputs(llama)
    assert type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(plain(**inputs).logits, llama(**inputs).logits)


def test_large_models_are_sharded(
    llama: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liger_fx.storage.weights.SHARD_BYTES", 30_000)
    liger_fx.save(llama, tmp_path / "a")
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "a" / "model.safetensors").exists()
    assert [s.name for s in shards][0] == f"model-00001-of-{len(shards):05}.safetensors"
    inputs = make_inputs(llama)
    assert torch.equal(liger_fx.load(tmp_path / "a")(**inputs).logits, llama(**inputs).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(plain.lm_head.weight, llama.lm_head.weight)  # type: ignore[arg-type]


def test_frozen_parameters_and_modes_come_back(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"))
    opt.model.embed_tokens.requires_grad_(False)
    opt.train()
    opt.model.layers[1].eval()
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    frozen = [path for path, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    modes = {path: module.training for path, module in loaded.named_modules()}
    assert modes == {path: module.training for path, module in opt.named_modules()}


def test_attention_implementation_and_generation_config_come_back(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama", attention="eager"))
    opt.generation_config.max_new_tokens = 3
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    assert loaded.config._attn_implementation == "eager"
    assert loaded.generate(make_inputs(opt, 1, 4)["input_ids"]).shape[1] <= 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_is_written_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("gemma3_text", dtype=dtype))
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    for (path, ours), theirs in zip(
        [*loaded.named_parameters(), *loaded.named_buffers()],
        [*opt.parameters(), *opt.buffers()],
        strict=True,
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), path
    inputs = make_inputs(opt)
    assert torch.equal(loaded(**inputs).logits, opt(**inputs).logits)
    assert len(loaded.plans) == 1
