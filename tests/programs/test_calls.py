"""The ways a model is called, whole and in parts: same answers, by graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests.programs.support import (
    CHECK,
    build,
    compare,
    graph_runs,
    make_inputs,
    optimize,
    perturb,
    run,
    same,
    train_step,
)
from tests.support.families import config

NAMES = ["llama", "gemma2", "qwen3"]


def inputs_of(model: Any, **options: Any) -> dict[str, Any]:
    return make_inputs(model, 2, 9, **({"pad": True} | options))


@pytest.mark.parametrize("name", NAMES)
def test_whole_model(name: str) -> None:
    model = build(name)
    inputs = inputs_of(model, labels=True)
    compare(model, lambda m: [m(**inputs), train_step(m, inputs)], calls=2)


@pytest.mark.parametrize("name", NAMES)
def test_base_model(name: str) -> None:
    model = build(name)
    inputs = inputs_of(model)

    def program(m: Any) -> Any:
        with torch.no_grad():
            return m.base_model(**inputs), m.model(inputs["input_ids"], return_dict=False)[0]

    compare(model, program, calls=2)


@pytest.mark.parametrize("name", NAMES)
def test_one_layer(name: str) -> None:
    """By the layer class's own signature, with tables that the caller made."""
    model = build(name)
    x = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def program(m: Any) -> Any:
        layer = m.model.layers[1]
        positions = torch.arange(9)[None]
        if name == "gemma2":
            tables = m.model.rotary_emb(x, positions)
        else:
            tables = m.model.rotary_emb(x, position_ids=positions)
        leaf = x.clone().requires_grad_()
        first = layer(leaf, position_embeddings=tables, attention_mask=None)
        second = layer(leaf[:, :5], position_embeddings=tuple(t[:, :5] for t in tables))
        (gradient,) = torch.autograd.grad(first.square().sum(), leaf)
        return first, second, gradient

    original_rotaries = 1  # of one layer
    twin_of = build(name)
    opt = optimize(model)
    theirs = run(program, twin_of)
    with graph_runs(opt, calls=2, rotary=original_rotaries):
        same(run(program, opt), theirs)


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
def test_a_part_of_a_layer(part: str) -> None:
    """What is no block of its own answers as it did, whoever computes it."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    x = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def program(m: Any) -> Any:
        module = getattr(m.model.layers[0], part)
        if part != "self_attn":
            return module(x)
        tables = m.model.rotary_emb(x, position_ids=torch.arange(9)[None])
        return module(x, position_embeddings=tables, attention_mask=None)[0]

    same(run(program, opt), run(program, twin_of))


HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"labels": torch.tensor([2, 0])}),
    "several labels": (AutoModelForSequenceClassification, {"labels": torch.eye(3)[:2]}),
    "regression": (AutoModelForSequenceClassification, {"labels": torch.tensor([0.5, -1.0])}),
    "token": (AutoModelForTokenClassification, {"labels": torch.arange(18).view(2, 9) % 3}),
    "question": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([4, 5])},
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_other_heads(name: str, head: str) -> None:
    cls, labels = HEADS[head]
    count = 1 if head == "regression" else 3
    torch.manual_seed(0)
    model = perturb(cls.from_config(config(name, num_labels=count)))
    inputs = inputs_of(model) | labels
    compare(model, lambda m: [m(**inputs), train_step(m, inputs)], calls=2)


OPTIONS: dict[str, dict[str, Any]] = {
    "logits_to_keep": {"logits_to_keep": 1},
    "logits_to_keep as indices": {"logits_to_keep": torch.tensor([0, 4])},
    "output_hidden_states": {"output_hidden_states": True},
    "chosen hidden states": {"output_hidden_states": [0, -1]},
    "output_attentions": {"output_attentions": True},
    "both": {"output_hidden_states": True, "output_attentions": True},
    "return_dict": {"return_dict": False},
    "use_cache": {"use_cache": False},
    "is_causal": {"is_causal": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_options(name: str, option: str) -> None:
    attention = "eager" if "attentions" in option or option == "both" else None
    model = build(name, attention=attention)
    inputs = inputs_of(model) | OPTIONS[option]

    def program(m: Any) -> Any:
        with torch.no_grad():
            return m(**inputs)

    compare(model, program)


@pytest.mark.parametrize("setting", ["output_hidden_states", "use_cache"])
def test_options_in_the_config(setting: str) -> None:
    def program(m: Any) -> Any:
        setattr(m.config, setting, setting == "output_hidden_states")
        with torch.no_grad():
            return m(**inputs_of(m))

    compare(build("llama"), program)


def packed() -> dict[str, torch.Tensor]:
    """Three texts of 3, 4 and 5 tokens in one row."""
    ids = torch.randint(3, 131, (1, 12), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in (3, 4, 5)])[None]
    return {"input_ids": ids, "position_ids": positions}


@pytest.mark.parametrize("name", NAMES)
def test_packed_positions(name: str) -> None:
    """Positions that begin anew keep the texts of a row apart."""
    model = build(name)
    inputs = packed() | {"labels": packed()["input_ids"]}
    opt = compare(model, lambda m: [m(**inputs), train_step(m, inputs)], calls=2)
    with torch.no_grad():
        alone = opt(packed()["input_ids"][:, :3]).logits
        same(opt(**packed()).logits[:, :3], alone)
        apart = opt(packed()["input_ids"][:, 3:7]).logits
        same(opt(**packed(), use_cache=False).logits[:, 3:7], apart)


def test_shift_labels() -> None:
    model = build("llama")
    inputs = inputs_of(model, labels=True)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    inputs["shift_labels"] = shifted.contiguous()
    compare(model, lambda m: train_step(m, inputs))


def test_flash_attention_keywords_are_handed_on() -> None:
    """What a padding-free collator adds; sdpa does not read it."""
    model = build("llama")
    ends = torch.tensor([0, 3, 7, 12], dtype=torch.int32)
    inputs: dict[str, Any] = packed() | {
        "labels": packed()["input_ids"],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 5,
        "max_length_k": 5,
    }
    compare(model, lambda m: train_step(m, inputs))


def test_the_number_of_items_makes_no_plan_of_its_own() -> None:
    """The Trainer hands on another number at each step of accumulation; a tensor is another kind of
    call, but one."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    inputs = inputs_of(model, labels=True)
    plans = []
    with graph_runs(opt, calls=5):
        for count in (10, 11, 12, torch.tensor(13), torch.tensor(14)):
            step = inputs | {"num_items_in_batch": count}
            same(train_step(opt, step), train_step(twin_of, step))
            plans.append(len(getattr(opt, "plans", ())))
    more = [count - plans[0] for count in plans]
    assert CHECK != "graphs" or more == [0, 0, 0, 1, 1], f"plans after each step: {plans}"


@pytest.mark.parametrize("kind", ["ids", "embeds", "positions", "no mask", "4d mask", "bool mask"])
def test_kinds_of_inputs(kind: str) -> None:
    model = build("llama")
    inputs = inputs_of(model, embeds=kind == "embeds", positions=kind == "positions")
    if kind == "no mask":
        del inputs["attention_mask"]
    elif kind == "bool mask":
        inputs["attention_mask"] = inputs["attention_mask"].bool()
    elif kind == "4d mask":
        causal = torch.ones(9, 9, dtype=torch.bool).tril()
        inputs["attention_mask"] = causal.expand(2, 1, 9, 9).clone()
    compare(model, lambda m: m(**inputs).logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_and_dtypes(name: str, dtype: torch.dtype) -> None:
    """In the dtype itself; bf16 also as autocast. Compared as far as the dtype carries."""
    bound = {torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    inputs = inputs_of(build(name), labels=True)
    compare(build(name, dtype=dtype), lambda m: m(**inputs).loss, rtol=bound, atol=bound)
    if dtype is torch.bfloat16:

        def program(m: Any) -> Any:
            with torch.autocast("cpu", dtype=dtype):
                return m(**inputs).loss

        compare(build(name), program, rtol=bound, atol=bound)


def test_everything_in_turn() -> None:
    """Train, eval, no_grad, inference mode, other sizes: one model, one after the other."""
    model = build("llama")

    def program(m: Any) -> Any:
        results: list[Any] = []
        for batch, length in ((2, 9), (1, 1), (3, 17), (1, 2)):
            inputs = make_inputs(m, batch, length, pad=length > 3, labels=length > 1)
            m.train()
            results.append(m(**inputs).logits)
            m.eval()
            with torch.no_grad():
                results.append(m(**inputs).logits)
            with torch.inference_mode():
                results.append(m(**inputs).logits.clone())
        return results

    compare(model, program, calls=12)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_first_call_inside_a_jit_trace() -> None:
    model = build("llama").eval()
    ids = inputs_of(model)["input_ids"]
    opt = optimize(model)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = opt

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(ids, use_cache=False).logits
            return logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), ids, check_trace=False)
        assert torch.allclose(traced(ids), model(ids).logits, atol=1e-5)


# -- what may become of the weight of a norm after optimize ----------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _as_buffer(norm: Any) -> None:
    weight = norm.weight.detach()
    del norm.weight
    norm.register_buffer("weight", weight)


KINDS: dict[str, Any] = {
    "pruned": lambda norm: prune.l1_unstructured(norm, "weight", 0.3),
    "parametrised": lambda norm: register_parametrization(norm, "weight", Doubled()),
    "a buffer": _as_buffer,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "cohere2"])
@pytest.mark.filterwarnings("ignore::liger_fx.errors.FallbackWarning")
def test_the_weight_of_a_norm_becomes(kind: str, name: str) -> None:
    model = build(name)
    inputs = inputs_of(model, labels=True)
    opt = optimize(model)
    for one in (model, opt):
        KINDS[kind](one.model.layers[1].input_layernorm)
    for program in (lambda m: m(**inputs), lambda m: train_step(m, inputs)["loss"]):
        same(run(program, opt), run(program, model))
