"""Copied, pickled, saved, loaded, resized, tied, edited: it stays the model that it is."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import liger_fx
from tests.programs.models import tiny, tiny_inputs
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
    weights,
)


def logits(m: Any) -> torch.Tensor:
    with torch.no_grad():
        return m(**make_inputs(m, 2, 9, pad=True)).logits


def through_torch_save(m: Any) -> Any:
    stored = io.BytesIO()
    torch.save(m, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
    "copy of a copy": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(m)))),
}


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
@pytest.mark.parametrize("kind", COPIES)
def test_copies(kind: str, called: bool) -> None:
    """A copy computes by graphs too, with its own weights unless it is a shallow one."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    if called:
        logits(opt)
        train_step(opt, make_inputs(opt, 2, 9, labels=True))
        opt.zero_grad()
    twin = COPIES[kind](opt)
    assert type(twin).__name__ == type(opt).__name__
    assert isinstance(twin, type(twin_of))
    expected = logits(twin_of)
    with graph_runs(twin):
        same(logits(twin), expected)
    step = make_inputs(twin_of, 2, 9, labels=True)
    with graph_runs(twin):
        same(train_step(twin, step), train_step(twin_of, step))
    shared = twin.lm_head.weight is opt.lm_head.weight
    assert shared == (kind == "copy")
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
        assert torch.allclose(logits(opt), expected, atol=1e-4) != shared
    with graph_runs(opt):
        logits(opt)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_layer_copied_alone(kind: str) -> None:
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    x = torch.randn(2, 9, model.config.hidden_size)
    tables = twin_of.model.rotary_emb(x, position_ids=torch.arange(9)[None])
    layer = COPIES[kind](opt.model.layers[1])
    with graph_runs(layer, rotary=1):
        same(
            layer(x, position_embeddings=tables),
            twin_of.model.layers[1](x, position_embeddings=tables),
        )


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "qwen2_vl"])
def test_copies_of_other_kinds(name: str) -> None:
    model, twin_of = tiny(name), tiny(name)
    inputs = tiny_inputs(model)
    opt = optimize(model)
    for kind in ("deepcopy", "pickle"):
        twin = COPIES[kind](opt)
        with torch.no_grad(), graph_runs(twin):
            same(twin(**inputs).logits, twin_of(**inputs).logits)


def test_from_pretrained_of_its_type_is_the_plain_class(tmp_path: Path) -> None:
    model = build("llama")
    opt = optimize(model)
    opt.save_pretrained(tmp_path)
    for cls in (type(opt), type(model)):
        back = cls.from_pretrained(tmp_path).eval()
        assert type(back) is type(model) or CHECK == "originals"
        assert not isinstance(back, fx.GraphModule)
        same(logits(back), logits(model))
    assert type(type(opt)(model.config)) is type(model)
    assert type(type(opt)._from_config(model.config)) is type(model)


def test_loading_weights() -> None:
    """load_state_dict, in place and assigned: graphs see the new weights."""
    other = build("llama", seed=1)

    def program(m: Any) -> Any:
        results = [logits(m)]
        m.load_state_dict(other.state_dict())
        results.append(logits(m))
        m.load_state_dict({k: v.clone() * 0.5 for k, v in other.state_dict().items()}, assign=True)
        results.append(logits(m))
        return results

    compare(build("llama"), program, calls=3)


def test_init_weights_does_not_reset() -> None:
    def program(m: Any) -> Any:
        m.init_weights()
        return logits(m)

    compare(build("llama"), program)


def test_activations_still_answer() -> None:
    """Attributes of replaced modules that other code reads."""
    model = build("llama")
    opt = optimize(model)
    x = torch.linspace(-2, 2, 9)
    for layer, original in zip(opt.model.layers, model.model.layers, strict=True):
        same(layer.mlp.act_fn(x), original.mlp.act_fn(x))
        assert layer.mlp.hidden_size == original.mlp.hidden_size
        assert layer.mlp.intermediate_size == original.mlp.intermediate_size
        assert layer.input_layernorm.variance_epsilon == original.input_layernorm.variance_epsilon
        assert layer.self_attn.layer_idx == original.self_attn.layer_idx
        assert layer.self_attn.scaling == original.self_attn.scaling
        assert layer.hidden_size == original.hidden_size
        assert isinstance(layer, type(original))
    assert opt.model.padding_idx == model.model.padding_idx
    assert opt.vocab_size == model.vocab_size


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied: bool) -> None:
    def program(m: Any) -> Any:
        before = logits(m)
        m.resize_token_embeddings(140, mean_resizing=False)
        with torch.no_grad():
            m.get_input_embeddings().weight[131:].fill_(0.01)
            m.get_output_embeddings().weight[131:].fill_(0.01)
        assert m.config.vocab_size == 140 and m.vocab_size == 140
        assert tied == (m.get_input_embeddings().weight is m.get_output_embeddings().weight)
        generated = m.generate(**make_inputs(m, 2, 5), max_new_tokens=4, min_new_tokens=4)
        step = make_inputs(m, 2, 9, labels=True)
        return before, logits(m), generated, train_step(m, step)

    compare(build("llama", tie_word_embeddings=tied), program, calls=7)


def test_tie_weights() -> None:
    def program(m: Any) -> Any:
        before = logits(m)
        m.config.tie_word_embeddings = True
        m.tie_weights()
        return before, logits(m), m.lm_head.weight is m.model.embed_tokens.weight

    compare(build("llama"), program, calls=2)


def test_new_embeddings_and_head() -> None:
    def program(m: Any) -> Any:
        before = logits(m)
        torch.manual_seed(4)
        m.set_input_embeddings(torch.nn.Embedding(131, m.config.hidden_size))
        m.set_output_embeddings(torch.nn.Linear(m.config.hidden_size, 131, bias=False))
        return before, logits(m)

    compare(build("llama"), program, calls=2)


def test_editing_the_graph() -> None:
    """opt.graph is the graph that runs: edited and recompiled, the answer changes."""
    if CHECK == "originals":
        pytest.skip("the original has no graph")
    opt = liger_fx.optimize(build("llama"))
    inputs = make_inputs(opt, 2, 9, pad=True)

    def served(m: Any) -> torch.Tensor:
        """What the call that ``opt.graph`` was traced for gives."""
        return m(**inputs).logits.detach()

    before = served(opt)
    heads = [n for n in opt.graph.nodes if n.op == "call_module" and n.target == "lm_head"]
    assert len(heads) == 1, [n.target for n in opt.graph.nodes if n.op == "call_module"]
    with opt.graph.inserting_after(heads[0]):
        doubled = opt.graph.call_function(torch.mul, (heads[0], 2))
    heads[0].replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    opt.graph.lint()
    opt.recompile()
    with graph_runs(opt):
        same(served(opt), before * 2)
    with graph_runs(opt):
        same(served(copy.deepcopy(opt)), before * 2)


def test_editing_the_graph_of_a_layer() -> None:
    if CHECK == "originals":
        pytest.skip("the original has no graph")
    opt = liger_fx.optimize(build("llama"))
    inputs = make_inputs(opt, 2, 9, pad=True)
    before = opt(**inputs).logits
    layer = opt.model.layers[1]
    assert isinstance(layer, fx.GraphModule), type(layer)
    named = [n for n in layer.graph.nodes if n.op == "call_module" and n.target == "mlp"]
    assert len(named) == 1
    with layer.graph.inserting_after(named[0]):
        zero = layer.graph.call_function(torch.mul, (named[0], 0))
    named[0].replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    layer.recompile()
    found = opt(**inputs).logits
    assert not torch.allclose(found, before, atol=1e-3)
    expected = build("llama")
    with torch.no_grad():
        expected.model.layers[1].mlp.down_proj.weight.zero_()
    with graph_runs(opt):
        same(opt(**inputs).logits, expected(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["model.layers.0", "model.layers.0.self_attn", "model"])
def test_one_submodule_in_another_mode(place: str) -> None:
    """Frozen parts are put into eval mode while the rest trains: dropout follows."""
    model = build("llama", attention_dropout=0.4)

    def program(m: Any) -> Any:
        results = []
        for outer, inner in ((True, False), (False, True), (True, True), (False, False)):
            m.train(outer)
            m.get_submodule(place).train(inner)
            torch.manual_seed(1)
            results.append(m(**make_inputs(m, 2, 9)).logits)
        assert not torch.equal(results[0], results[2])
        return results

    compare(model, program, calls=4)


def test_frozen_layers() -> None:
    def program(m: Any) -> Any:
        for parameter in m.model.layers[0].parameters():
            parameter.requires_grad_(False)
        m.model.embed_tokens.requires_grad_(False)
        return train_step(m, make_inputs(m, 2, 9, labels=True))

    compare(build("llama"), program)


@pytest.mark.slow
def test_a_step_of_an_optimizer() -> None:
    def program(m: Any) -> Any:
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        for seed in range(3):
            train_step(m, make_inputs(m, 2, 9, labels=True, seed=seed))
            optimizer.step()
        return logits(m)

    compare(build("llama"), program, calls=4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_moved_to_another_dtype(dtype: torch.dtype) -> None:
    bound = 0.05 if dtype is torch.bfloat16 else 1e-5

    def program(m: Any) -> Any:
        first = logits(m)
        m.to(dtype)
        return first, logits(m), logits(m.float())

    compare(build("llama"), program, calls=3, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_another_attention(attention: str) -> None:
    def program(m: Any) -> Any:
        first = logits(m)
        m.set_attn_implementation(attention)
        second = logits(m)
        m.set_attn_implementation("sdpa")
        return first, second, logits(m)

    compare(build("llama"), program, calls=3)


def test_layers_cut_off() -> None:
    """Early exit and pruning: fewer layers in the list, fewer are run."""

    def program(m: Any) -> Any:
        m.model.layers = m.model.layers[:2]
        m.config.num_hidden_layers = 2
        return logits(m), m.generate(**make_inputs(m, 2, 5), max_new_tokens=3, min_new_tokens=3)

    compare(build("llama", num_hidden_layers=3), program, calls=1)


def test_layers_exchanged() -> None:
    def program(m: Any) -> Any:
        first = logits(m)
        layers = m.model.layers
        layers[0], layers[1] = layers[1], layers[0]
        return first, logits(m)

    compare(build("llama"), program, calls=2)


def test_restore() -> None:
    """liger_fx.restore(opt): the plain class again, with the weights as they were trained."""
    if CHECK == "originals":
        pytest.skip("nothing was optimised")
    model, twin_of = build("llama"), build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9, labels=True)
    for m in (opt, twin_of):
        train_step(m, inputs)
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    plain = liger_fx.restore(opt)
    assert type(plain) is type(twin_of)
    for (path, ours), (_, theirs) in zip(
        plain.named_modules(), twin_of.named_modules(), strict=True
    ):
        assert type(ours) is type(theirs), path
    same(weights(plain), weights(twin_of))
    same(logits(plain), logits(twin_of))
    again = liger_fx.optimize(plain)
    with graph_runs(again):
        same(logits(again), logits(twin_of))


def test_restore_keeps_what_was_set() -> None:
    if CHECK == "originals":
        pytest.skip("nothing was optimised")
    opt = liger_fx.optimize(build("llama")).train()
    opt.config.use_cache = False
    calls: list[int] = []
    opt.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    plain = liger_fx.restore(opt)
    assert plain.training and plain.config.use_cache is False
    run(lambda m: logits(m), plain)
    assert calls == [1]
