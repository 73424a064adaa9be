"""Which blocks a model has, how many distinct graphs, and that all of them are one whole."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

import liger_fx
from liger_fx.inputs import example_inputs
from liger_fx.model.account import blocks_of
from liger_fx.tiny import tiny_model

# The distinct graphs of models of four layers: for each class, how many blocks share one.
GRAPHS = {
    "llama": {"LlamaDecoderLayer": [4]},
    "mistral": {"MistralDecoderLayer": [4]},
    "qwen2": {"Qwen2DecoderLayer": [4]},
    "qwen3": {"Qwen3DecoderLayer": [4]},
    "gemma": {"GemmaDecoderLayer": [4]},
    "gemma2": {"Gemma2DecoderLayer": [2, 2]},  # every other one looks at a window
    "gemma3_text": {"Gemma3DecoderLayer": [4]},  # six layers to a pattern
    "phi3": {"Phi3DecoderLayer": [4]},
    "olmo2": {"Olmo2DecoderLayer": [4]},
    "smollm3": {"SmolLM3DecoderLayer": [3, 1]},  # the last turns nothing
    "granite": {"GraniteDecoderLayer": [4]},
    "cohere2": {"Cohere2DecoderLayer": [3, 1]},
    "gpt2": {"GPT2Block": [4]},
    "mixtral": {"MixtralDecoderLayer": [4]},
    "gpt_oss": {"GptOssDecoderLayer": [2, 2]},
    "bert": {"BertLayer": [4]},
    # the first block of each stack makes the positions' bias
    "t5": {"T5Block": [1, 3, 1, 3], "T5Stack": [1, 1]},
}


@pytest.mark.filterwarnings("ignore::liger_fx.errors.NothingRewrittenWarning")
@pytest.mark.parametrize("name", GRAPHS)
def test_alike_layers_share_one_graph(name: str) -> None:
    opt = liger_fx.optimize(tiny_model(name, 4))
    assert opt.report.fallbacks == ()
    members: dict[int, list[str]] = {}
    for block in blocks_of(opt).values():
        (plan,) = block.plans
        members.setdefault(id(plan.graph), []).append(type(block).__name__)
    shared: dict[str, list[int]] = {}
    for classes in members.values():
        shared.setdefault(classes[0], []).append(len(classes))
    found = {kind: shared.pop(kind) for kind in GRAPHS[name]}
    assert found == GRAPHS[name]
    assert all(counts == [1] for counts in shared.values()) and len(shared) in (1, 2)


def test_alike_layers_share_one_function_and_know_which_they_are() -> None:
    model = tiny_model("llama", 3)
    opt = liger_fx.optimize(model)
    assert len({layer.plans[0].function for layer in opt.model.layers}) == 1
    cache = opt(**example_inputs(model, 2, 5), use_cache=True).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [5, 5, 5]


def gradients(model: torch.nn.Module, run: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = {k: v for k, v in example_inputs(model, 2, 9).items() if k != "labels"}
    run(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_flat_it_is_the_same(name: str) -> None:
    model = tiny_model(name, 2)
    opt = liger_fx.optimize(model)
    flat = liger_fx.flatten(opt)
    assert type(flat).__mro__[1] is fx.GraphModule
    called = {str(n.target) for n in flat.graph.find_nodes(op="call_module")}
    rewritten = {site.after.removeprefix("call_module ") for site in opt.report.rewritten}
    assert rewritten and rewritten <= called
    expected, found = gradients(model, opt), gradients(model, flat)
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, expected[path], rtol=0, atol=0, msg=path)


def test_no_blocks_is_one_flat_graph() -> None:
    model = tiny_model("llama", 2)
    opt = liger_fx.optimize(model, blocks=())
    assert list(blocks_of(opt)) == [""]
    flat = liger_fx.flatten(liger_fx.optimize(model))
    called = [str(n.target) for n in opt.graph.find_nodes(op="call_module")]
    assert called == [str(n.target) for n in flat.graph.find_nodes(op="call_module")]


def test_blocks_are_chosen_by_path() -> None:
    model = tiny_model("llama", 3)
    opt = liger_fx.optimize(model, blocks=["model.layers.1", "*.mlp"])
    assert set(blocks_of(opt)) == {
        "",
        "model.layers.1",
        *(f"model.layers.{i}.mlp" for i in range(3)),
    }
    inputs = example_inputs(model, 2, 5)
    torch.testing.assert_close(opt(**inputs).loss, model(**inputs).loss)


def test_an_edited_graph_is_that_layers_alone() -> None:
    model = tiny_model("llama", 2)
    opt = liger_fx.optimize(model)
    layers, inputs = opt.model.layers, example_inputs(model, 2, 5)
    before, code, sites = opt(**inputs).logits, layers[0].code, len(opt.report.rewritten)
    add = next(n for n in layers[1].graph.nodes if n.name.startswith("add"))
    add.op, add.target = "call_function", operator.sub
    layers[1].recompile()
    assert "-" in layers[1].code and layers[0].code == code
    assert not torch.allclose(opt(**inputs).logits, before)
    assert len(opt.report.rewritten) == sites


def test_layers_that_were_changed_keep_their_sites() -> None:
    """A hook in one layer: its new graph is traced through the named modules that are there."""
    model = tiny_model("llama", 2)
    opt = liger_fx.optimize(model)
    opt(**example_inputs(model, 2, 5))
    sites = {(s.rule, s.path) for s in opt.report.rewritten}
    opt.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    opt(**example_inputs(model, 2, 5))
    assert opt.model.layers[0].plans[-1] is not opt.model.layers[1].plans[-1]
    assert {(s.rule, s.path) for s in opt.report.rewritten} == sites
    assert any("model.layers.1.self_attn" in told for told in opt.report.opaque)


def test_a_list_of_layers_is_cut() -> None:
    model, twin = tiny_model("llama", 3), tiny_model("llama", 3)
    opt, inputs = liger_fx.optimize(model), example_inputs(tiny_model("llama", 3), 2, 5)
    with torch.no_grad():
        opt(**inputs)  # the graph of the whole was used
        for one in (opt, twin):
            one.model.layers = one.model.layers[:2]
            one.config.num_hidden_layers = 2
        torch.testing.assert_close(opt(**inputs).logits, twin(**inputs).logits)
    assert opt.report.fallbacks == ()
