"""Weights elsewhere, quantised, or not there yet: accelerate, bitsandbytes, torchao, meta."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import liger_fx
from tests.programs.support import (
    CHECK,
    build,
    compare,
    graph_runs,
    make_inputs,
    optimize,
    run,
    same,
    train_step,
)
from tests.support.families import Scale, config

accelerate = pytest.importorskip("accelerate")


def logits(m: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [m(**make_inputs(m, 2, 9, pad=True)).logits, m(**make_inputs(m, 1, 4)).logits]


def inputs_on_cpu() -> dict[str, torch.Tensor]:
    return make_inputs(build("llama"), 2, 9, pad=True)


def given(m: Any) -> torch.Tensor:
    """An offloaded model's parameters are on the meta device, its inputs are not."""
    with torch.no_grad():
        return m(**inputs_on_cpu()).logits


def cpu_offloaded(m: Any) -> Any:
    return accelerate.cpu_offload(m, execution_device=torch.device("cpu"), offload_buffers=True)


def disk_offloaded(m: Any, folder: Path) -> Any:
    return accelerate.disk_offload(m, folder, execution_device=torch.device("cpu"))


def dispatched(m: Any, folder: Path) -> Any:
    places: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "lm_head": "cpu",
    }
    return accelerate.dispatch_model(
        m, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


WAYS: dict[str, Any] = {
    "cpu_offload": lambda m, folder: cpu_offloaded(m),
    "disk_offload": disk_offloaded,
    "dispatch_model": dispatched,
}


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_after(way: str, tmp_path: Path) -> None:
    """optimize, then hand the result to accelerate."""

    def program(m: Any) -> Any:
        placed = WAYS[way](m, tmp_path / f"{id(m)}")
        results = [given(placed), given(placed)]
        away = [n for n, p in placed.named_parameters() if p.device.type == "meta"]
        assert away, "something was offloaded"
        return results

    compare(build("llama"), program)


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_before(way: str, tmp_path: Path) -> None:
    """optimize() of a model with accelerate's hooks: it works, or one sentence says why not."""
    model, twin_of = build("llama"), build("llama")
    placed = WAYS[way](model, tmp_path / "ours")
    if CHECK == "originals":
        same(given(placed), given(twin_of))
        return
    try:
        opt = optimize(placed)
    except liger_fx.LigerFxError as error:
        assert "\n" not in str(error) and "accelerate" in str(error)
        same(given(placed), given(twin_of))  # the given model was left in order
        return
    with graph_runs(opt):
        same(given(opt), given(twin_of))


def on_one_device(m: Any) -> Any:
    """What ``device_map="auto"`` leaves of a model that fits: hooks that bring inputs."""
    names = ("embed_tokens", "rotary_emb", "layers.0", "layers.1", "norm")
    places: dict[str, Any] = dict.fromkeys((*(f"model.{n}" for n in names), "lm_head"), "cpu")
    accelerate.hooks.attach_align_device_hook_on_blocks(m, execution_device=places)
    return m


@pytest.mark.parametrize("before", [True, False])
def test_dispatched_to_where_it_is(before: bool) -> None:
    """Layers are rewritten as without the hooks, which stay around them."""
    twin_of = build("llama")
    placed = optimize(on_one_device(build("llama")) if before else build("llama"))
    opt = placed if before else on_one_device(placed)
    assert "forward" in vars(opt.model.layers[1].self_attn)
    kinds = [type(m).__name__ for m in optimize(build("llama")).model.layers[1].modules()]
    with graph_runs(opt):
        same(given(opt), given(twin_of))
    assert [type(m).__name__ for m in opt.model.layers[1].modules()] == kinds


def test_a_layer_that_is_brought_elsewhere_is_called() -> None:
    """The hook of the module inside says another device: it brings its inputs there."""
    opt = optimize(build("llama"))
    on_one_device(opt)
    twin_of = build("llama")
    attention = opt.model.layers[1].self_attn
    attention._hf_hook.execution_device = torch.device("cpu", 0)
    seen: list[Any] = []
    brings = attention._hf_hook.pre_forward
    attention._hf_hook.pre_forward = lambda *args, **kwargs: (
        seen.append(1) or brings(*args, **kwargs)
    )
    same(given(opt), given(twin_of))
    assert seen == [1]


def test_hooks_are_taken_off_what_was_dispatched_before() -> None:
    from accelerate.hooks import remove_hook_from_submodules

    opt, twin_of = optimize(on_one_device(build("llama"))), build("llama")
    remove_hook_from_submodules(opt)
    assert not any(hasattr(m, "_hf_hook") for m in opt.modules())
    with graph_runs(opt):
        same(given(opt), given(twin_of))


def test_a_hook_on_the_norm_of_a_sum() -> None:
    """A named module that is called with more than the model's code gives it."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Halves(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            (x,) = args
            return (x / 2,), kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            return output / 3

    def program(m: Any) -> Any:
        first = given(m)
        add_hook_to_module(m.model.layers[1].post_attention_layernorm, Halves())
        return first, given(m)

    compare(build("llama"), program, calls=2)


def test_hooks_put_on_and_taken_off() -> None:
    from accelerate.hooks import remove_hook_from_submodules

    def program(m: Any) -> Any:
        first = given(m)
        cpu_offloaded(m)
        second = given(m)
        remove_hook_from_submodules(m)
        return first, second, given(m), type(m).__name__

    compare(build("llama"), program, calls=2)


def test_a_hook_of_ones_own_on_each_layer() -> None:
    """accelerate's add_hook_to_module, on layers: once a call, each layer by itself."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            return output

    def program(m: Any) -> Any:
        hooks = [Counting() for _ in m.model.layers]
        for layer, hook in zip(m.model.layers, hooks, strict=True):
            add_hook_to_module(layer, hook)
        found = logits(m)
        assert [hook.calls for hook in hooks] == [2] * len(hooks)
        return found

    compare(build("llama"), program, calls=2)


def test_a_hook_on_layers_with_checkpointing() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    def program(m: Any) -> Any:
        for layer in m.model.layers:
            add_hook_to_module(layer, ModelHook())
        m.activation_checkpointing_enable()
        return train_step(m.train(), make_inputs(m, 2, 9, labels=True))

    compare(build("llama"), program, calls=1)


def test_layerwise_casting() -> None:
    """Weights kept in bf16, each layer computing in float32, by hooks that swap them."""

    def program(m: Any) -> Any:
        for layer in m.model.layers:
            layer.to(torch.bfloat16)
            layer.register_forward_pre_hook(lambda sub, args: sub.to(torch.float32) and None)
            layer.register_forward_hook(lambda sub, args, out: sub.to(torch.bfloat16) and None)
        return logits(m)

    original = build("llama")
    opt = optimize(build("llama"))
    same(run(program, opt), run(program, original))


def test_moved_to_meta_and_back(tmp_path: Path) -> None:
    """A model made on the meta device and optimised there, given its weights afterwards."""
    original = build("llama")
    original.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config("llama")).eval()
    opt = optimize(empty)
    state = {k: v.clone() for k, v in original.state_dict().items()}
    opt.load_state_dict(state, assign=True)
    # tables of the rotary embedding are no part of the state
    opt.model.rotary_emb = copy.deepcopy(original.model.rotary_emb)
    with graph_runs(opt, calls=2):
        same(logits(opt), logits(original))


@pytest.mark.slow
def test_loaded_into_an_optimised_empty_model(tmp_path: Path) -> None:
    """accelerate's load_checkpoint_and_dispatch onto an optimised empty model."""
    original = build("llama")
    original.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config("llama")).eval()
    opt = optimize(empty)
    placed = accelerate.load_checkpoint_and_dispatch(
        opt, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    with graph_runs(placed, calls=2):
        same(logits(placed), logits(original))


def test_to_empty_and_filled() -> None:
    original = build("llama")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config("llama")).eval()
    opt = optimize(empty)
    opt.to_empty(device="cpu")
    with torch.no_grad():
        for ours, theirs in zip(opt.parameters(), original.parameters(), strict=True):
            ours.copy_(theirs)
        for ours, theirs in zip(opt.buffers(), original.buffers(), strict=True):
            ours.copy_(theirs)
    with graph_runs(opt, calls=2):
        same(logits(opt), logits(original))


def four_bit(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # bitsandbytes packs blocks of 64
    build("llama", scale=Scale(hidden=64, intermediate=128)).save_pretrained(folder)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=options, device_map={"": "cpu"}
    ).eval()


def test_bitsandbytes_four_bit(tmp_path: Path) -> None:
    """Quantised linear layers are called as they are."""
    model, twin_of = four_bit(tmp_path / "a"), four_bit(tmp_path / "b")
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("Linear4bit") == 14, set(kinds)
    theirs = logits(twin_of)
    opt = optimize(model)
    with graph_runs(opt, calls=2):
        same(logits(opt), theirs)


@pytest.mark.slow
def test_qlora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def program(m: Any) -> Any:
        torch.manual_seed(3)
        prepared = peft.prepare_model_for_kbit_training(m)
        adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        wrapped = peft.get_peft_model(prepared, adapter)
        return train_step(wrapped.train(), make_inputs(m, 2, 9, labels=True))

    model, twin_of = four_bit(tmp_path / "a"), four_bit(tmp_path / "b")
    theirs = run(program, twin_of)
    opt = optimize(model)
    with graph_runs(opt):
        same(run(program, opt), theirs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_torchao_int8_weights(when: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(m: Any) -> Any:
        quantization.quantize_(m.model.layers, quantization.Int8WeightOnlyConfig())
        return m

    model, twin_of = build("llama"), quantise(build("llama"))
    assert "Int8" in type(twin_of.model.layers[0].mlp.up_proj.weight).__name__
    theirs = logits(twin_of)
    opt = optimize(quantise(model)) if when == "before" else quantise(optimize(model))
    with graph_runs(opt, calls=2):
        same(logits(opt), theirs)


@pytest.mark.slow
def test_torchao_by_transformers(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    build("llama").save_pretrained(tmp_path)
    options = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options).eval()
        for _ in range(2)
    ]
    theirs = logits(models[0])
    opt = optimize(models[1])
    with graph_runs(opt, calls=2):
        same(logits(opt), theirs)


@pytest.mark.slow
def test_dynamically_quantised_by_torch() -> None:
    """torch.ao's own dynamic quantisation replaces the linear layers of the result."""

    def program(m: Any) -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}, torch.qint8)
        return logits_of_any(twin)

    if "none" in torch.backends.quantized.engine:
        pytest.skip("this PyTorch has no engine for quantised layers")
    original = build("llama")
    opt = optimize(build("llama"))
    same(run(program, opt), run(program, original))


def logits_of_any(m: Any) -> torch.Tensor:
    with torch.no_grad():
        return m(**inputs_on_cpu()).logits
