"""A graph saved without weights meets a model or a checkpoint; other devices and dtypes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import liger_fx
from liger_fx.errors import LoadError, RetraceWarning, SaveError, UsageError
from liger_fx.model.block import Block
from liger_fx.tiny import tiny_model
from tests.storage import custom
from tests.support.families import build, config, make_inputs


@pytest.fixture(scope="session")
def bare(llama: Block, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the tiny Llama without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "llama"
    liger_fx.save(llama, folder, weights=False)
    return folder


def test_without_weights_there_are_no_weights(bare: Path) -> None:
    assert not list(bare.glob("model*")) and (bare / "graph.json").exists()
    with pytest.raises(LoadError, match=r"without weights.*model=.*checkpoint="):
        liger_fx.load(bare)


def test_bound_to_a_model_it_shares_its_weights(bare: Path) -> None:
    model = build("llama", num_hidden_layers=1, seed=5)
    before = [type(module) for module in model.modules()]
    loaded = liger_fx.load(bare, model=model)
    for (path, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert ours is theirs, path
    inputs = make_inputs(model, pad=True)
    assert torch.equal(loaded(**inputs).logits, liger_fx.optimize(model)(**inputs).logits)
    assert len(loaded.plans) == 1
    assert [type(module) for module in model.modules()] == before
    model.train()
    assert not loaded.training


def test_bound_to_a_checkpoint(bare: Path, tmp_path: Path) -> None:
    model = build("llama", num_hidden_layers=1, seed=6)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = liger_fx.load(bare, checkpoint=tmp_path / "checkpoint")
    inputs = make_inputs(model, pad=True)
    assert torch.equal(loaded(**inputs).logits, liger_fx.optimize(model)(**inputs).logits)
    assert len(loaded.plans) == 1


def test_bound_to_a_sharded_checkpoint_of_tied_weights(tmp_path: Path) -> None:
    model = build("qwen2")
    liger_fx.save(liger_fx.optimize(build("qwen2", seed=1)), tmp_path / "a", weights=False)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert (tmp_path / "checkpoint" / "model.safetensors.index.json").exists()
    loaded = liger_fx.load(tmp_path / "a", checkpoint=tmp_path / "checkpoint")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_checkpoints_that_transformers_converts(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, layers=2)
    model.save_pretrained(tmp_path / "checkpoint")
    liger_fx.save(liger_fx.optimize(tiny_model(name, layers=2)), tmp_path / "a", weights=False)
    with pytest.raises(LoadError, match=r"the weights lack it.*from_pretrained.*model=model"):
        liger_fx.load(tmp_path / "a", checkpoint=tmp_path / "checkpoint")
    read = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    loaded = liger_fx.load(tmp_path / "a", model=read)
    call = {"input_ids": torch.randint(3, 100, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    assert torch.equal(loaded(**call).logits, liger_fx.optimize(read)(**call).logits)
    assert len(loaded.plans) == 1


def test_a_model_without_weights_is_optimised_once_and_bound_later(tmp_path: Path) -> None:
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(config("llama"))
    opt = liger_fx.optimize(sketch.eval())
    with pytest.raises(SaveError, match="no weights.*weights=False"):
        liger_fx.save(opt, tmp_path / "a")
    liger_fx.save(opt, tmp_path / "a", weights=False)
    with pytest.raises(LoadError, match="of a model without weights"):
        liger_fx.load(tmp_path / "a", checkpoint=tmp_path)
    model = build("llama")
    inputs = make_inputs(model)
    loaded = liger_fx.load(tmp_path / "a", model=model)
    assert torch.equal(loaded(**inputs).logits, liger_fx.optimize(model)(**inputs).logits)
    assert len(loaded.plans) == 1


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"intermediate_size": 80}, "intermediate_size"),
    ],
)
def test_another_model_of_the_class_is_refused(
    bare: Path, change: dict[str, Any], named: str
) -> None:
    model = build("llama", **{"num_hidden_layers": 1, **change})
    with pytest.raises(LoadError, match=f"config.json.{named}"):
        liger_fx.load(bare, model=model)


def test_another_class_and_another_checkpoint_are_refused(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="of a LlamaForCausalLM, not of a MistralForCausalLM"):
        liger_fx.load(bare, model=build("mistral"))
    build("llama").save_pretrained(tmp_path / "deeper")
    with pytest.raises(LoadError, match=r"layers\.1.*the graph has no such tensor"):
        liger_fx.load(bare, checkpoint=tmp_path / "deeper")
    build("llama", num_hidden_layers=1, intermediate_size=80).save_pretrained(tmp_path / "thin")
    with pytest.raises(LoadError, match=r"mlp.*\[80, 56\] in the weights and float32\[88, 56\]"):
        liger_fx.load(bare, checkpoint=tmp_path / "thin")
    with pytest.raises(UsageError, match="no other argument"):
        liger_fx.load(bare, model=build("llama"), device="cpu")
    with pytest.raises(UsageError, match="not an optimised one"):
        liger_fx.load(bare, model=liger_fx.load(bare, model=build("llama", num_hidden_layers=1)))


def test_a_changed_module_is_refused(bare: Path) -> None:
    model = build("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.scaling = 0.5
    with pytest.raises(LoadError, match=r"layers\.0\.self_attn' is not.*attribute scaling is 0\.5"):
        liger_fx.load(bare, model=model)


def test_a_module_that_is_no_transformers_model(tmp_path: Path) -> None:
    model = custom.Net(scale=0.5).eval()
    x = torch.randn(3, 8)
    opt = liger_fx.optimize(model, (x,))
    with pytest.raises(SaveError, match="weights=False"):
        liger_fx.save(opt, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    liger_fx.save(opt, tmp_path / "a", weights=False)
    with pytest.raises(LoadError, match="cannot be made from a config"):
        liger_fx.load(tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a", model=model)
    assert torch.equal(loaded(x), opt(x)) and "LigerRMSNorm" in str(loaded)
    assert len(loaded.plans) == 1
    with pytest.raises(LoadError, match="'' is not the Net.*scale is 0.25 in the model, 0.5 here"):
        liger_fx.load(tmp_path / "a", model=custom.Net(scale=0.25).eval())


def test_constants_of_the_code_and_tensors_that_are_attributes(tmp_path: Path) -> None:
    model = custom.UsesConstants().eval()
    x = torch.randn(3, 4)
    traced = liger_fx.trace(model, (x,))
    liger_fx.save(traced, tmp_path / "a", weights=False)
    loaded = liger_fx.load(tmp_path / "a", model=custom.UsesConstants().eval())
    assert torch.equal(loaded(x), model(x)) and len(loaded.plans) == 1


def test_adapters_are_bound_to_a_model_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        made: nn.Module = peft.inject_adapter_in_model(lora, build("llama"))
        return made.eval()

    opt = liger_fx.optimize(adapted())
    with pytest.raises(SaveError, match="weights=False"):
        liger_fx.save(opt, tmp_path / "a")
    liger_fx.save(opt, tmp_path / "a", weights=False)
    loaded = liger_fx.load(tmp_path / "a", model=adapted())
    inputs = make_inputs(opt)
    assert torch.equal(loaded(**inputs).logits, opt(**inputs).logits)
    with pytest.raises(LoadError, match=r"q_proj' is not the peft\..* but a torch\."):
        liger_fx.load(tmp_path / "a", model=build("llama"))


def test_another_dtype_is_converted_said_and_traced_anew(llama: Block, saved: Path) -> None:
    with pytest.warns(RetraceWarning, match="traced anew"):
        loaded = liger_fx.load(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    inputs = make_inputs(llama)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded(**inputs).logits, liger_fx.optimize(plain)(**inputs).logits)
    assert len(loaded.plans) == 2


def test_a_dtype_that_a_saved_graph_holds_for_needs_no_trace(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama", dtype=torch.bfloat16))
    liger_fx.save(opt, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = liger_fx.load(tmp_path / "a", dtype=torch.bfloat16)
    loaded(**make_inputs(opt))
    assert len(loaded.plans) == 1


def test_only_graphs_that_the_model_can_still_use_are_saved(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"))
    opt.to(torch.bfloat16)
    with pytest.raises(SaveError, match="call it once"):
        liger_fx.save(opt, tmp_path / "a")
    inputs = make_inputs(opt)
    wanted = opt(**inputs).logits
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    assert torch.equal(loaded(**inputs).logits, wanted) and len(loaded.plans) == 1


def test_a_device_of_the_file_is_replaced_everywhere(saved: Path) -> None:
    # the meta device stands for any other: what names a device must name the new one
    loaded = liger_fx.load(saved, device="meta")
    devices = {t.device.type for t in (*loaded.parameters(), *loaded.buffers())}
    for node in loaded.graph.nodes:
        if "spec" in node.meta:
            devices.add(node.meta["spec"].device.type)
        devices |= {
            v.type for v in (*node.args, *node.kwargs.values()) if isinstance(v, torch.device)
        }
    devices |= {spec.device.type for spec in loaded.plans[0].guards.call.tensors.values()}
    assert devices == {"meta"} and loaded.plans[0].fits(loaded)


def test_a_device_that_is_not_there(saved: Path) -> None:
    missing = "xpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(LoadError, match=f"device: {missing} cannot be used"):
        liger_fx.load(saved, device=missing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_from_the_cpu_to_a_gpu_and_back_without_a_trace(name: str, tmp_path: Path) -> None:
    opt = liger_fx.optimize(build(name))
    liger_fx.save(opt, tmp_path / "a")
    there = liger_fx.load(tmp_path / "a", device="cuda")
    inputs = make_inputs(there, pad=True)
    wanted = liger_fx.optimize(build(name, device="cuda"))(**inputs).logits
    torch.testing.assert_close(there(**inputs).logits, wanted)
    assert len(there.plans) == 1 and there.generate(inputs["input_ids"][:1]).is_cuda
    liger_fx.save(there, tmp_path / "b")
    back = liger_fx.load(tmp_path / "b", device="cpu")
    inputs = make_inputs(back, pad=True)
    assert torch.equal(back(**inputs).logits, opt(**inputs).logits)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"dtype": torch.int32}, r"dtype=.*float32, torch\.bfloat16.*not torch\.int32"),
        ({"dtype": torch.complex64}, "not torch.complex64"),
        ({"dtype": torch.float8_e4m3fn}, "not torch.float8_e4m3fn"),
        ({"dtype": "bfloat16"}, "not 'bfloat16'"),
        ({"device": 0.5}, "a device or its name, not 0.5"),
        ({"model": 3}, "takes a model, not a int"),
        ({"checkpoint": 3}, "takes a directory, not a int"),
    ],
)
def test_arguments_of_another_kind(given: dict[str, Any], said: str, saved: Path) -> None:
    with pytest.raises(UsageError, match=said):
        liger_fx.load(saved, **given)
    with pytest.raises(UsageError, match="takes a directory"):
        liger_fx.load(None, **given)  # type: ignore[arg-type]


def test_inputs_of_another_kind(llama: Block, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a int"):
        liger_fx.export(llama, tmp_path / "a.pt2", 3)  # type: ignore[arg-type]


def test_what_was_asked_of_a_weight_is_saved(tmp_path: Path) -> None:
    x, model = torch.randn(2, 4), custom.AsksItsWeight()
    liger_fx.save(liger_fx.trace(model, (x,)), tmp_path / "a", weights=False)
    loaded = liger_fx.load(tmp_path / "a", model=model)
    assert torch.equal(loaded(x), model(x)) and len(loaded.plans) == 1
    asked = loaded.plans[0].guards.tensors
    assert asked.layouts == {"weight": ((4, 1), 0)} and asked.classes == {"weight": nn.Parameter}
    model.weight = nn.Parameter(model.weight.detach().t())
    loaded = liger_fx.load(tmp_path / "a", model=model)
    assert torch.equal(loaded(x), model(x)) and len(loaded.plans) == 2
    assert loaded.plans[1].guards.tensors.layouts == {"weight": ((1, 4), 0)}
