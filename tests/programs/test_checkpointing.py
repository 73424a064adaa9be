"""Gradient checkpointing, switched on before or after optimize: equal gradients, by graphs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tests.programs.support import (
    build,
    compare,
    gradients,
    make_inputs,
    optimize,
    train_step,
)

ENABLE = PreTrainedModel.activation_checkpointing_enable
KINDS = {"reentrant": True, "not reentrant": False}


def switch_on(model: Any, reentrant: bool, **options: Any) -> Any:
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}, **options
    )
    return model.train()


def inputs_of(model: Any) -> dict[str, Any]:
    return make_inputs(model, 2, 9, pad=True, labels=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "phi3"])
def test_on_before(name: str, kind: str) -> None:
    model = switch_on(build(name), KINDS[kind])
    # each layer runs twice: in the forward, and again in the backward
    compare(model, lambda m: train_step(m, inputs_of(m)), calls=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "phi3"])
def test_on_after(name: str, kind: str) -> None:
    def program(m: Any) -> Any:
        return train_step(switch_on(m, KINDS[kind]), inputs_of(m))

    compare(build(name), program, calls=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_on_and_off_and_on(kind: str) -> None:
    def program(m: Any) -> Any:
        inputs = inputs_of(m)
        steps = [train_step(switch_on(m, KINDS[kind]), inputs)]
        m.activation_checkpointing_disable()
        steps.append(train_step(m, inputs))
        m.eval()
        steps.append(train_step(m, inputs))
        steps.append(train_step(switch_on(m, KINDS[kind]), inputs))
        return steps

    compare(build("llama"), program, calls=6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_again_the_same(kind: str) -> None:
    model = build("llama", attention_dropout=0.3)
    compare(model, lambda m: train_step(switch_on(m, KINDS[kind]), inputs_of(m)), calls=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    def program(m: Any) -> Any:
        switch_on(m, KINDS[kind])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = m(**inputs_of(m)).loss
        loss.backward()
        return loss.detach(), gradients(m)

    compare(build("llama"), program, calls=2, rtol=0.1, atol=0.02)


def test_by_its_older_name() -> None:
    def program(m: Any) -> Any:
        m.gradient_checkpointing_enable()
        return train_step(m.train(), inputs_of(m))

    compare(build("llama"), program, calls=2)


@pytest.mark.skipif(
    "every_n_layers"
    not in inspect.signature(PreTrainedModel.activation_checkpointing_enable).parameters,
    reason="this transformers cannot",
)
def test_every_second_layer() -> None:
    def program(m: Any) -> Any:
        return train_step(switch_on(m, False, every_n_layers=2), inputs_of(m))

    # a layer of two runs twice
    compare(build("llama", num_hidden_layers=4), program)


def test_it_saves_memory() -> None:
    """The tensors kept for the backward are those between the layers, not those in them."""

    def kept(model: Any) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        inputs = make_inputs(model, 2, 64, labels=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs)
        return sum(sizes)

    def program(m: Any) -> Any:
        plain = kept(m.train())
        return kept(switch_on(m, False)) < 0.7 * plain

    model = build("llama", num_hidden_layers=4)
    assert program(build("llama", num_hidden_layers=4)), "the original saves memory"
    compare(model, program, calls=2)


def test_layers_by_hand() -> None:
    """A training loop of one's own: torch.utils.checkpoint around each layer."""

    def program(m: Any) -> Any:
        base = m.model
        ids = make_inputs(m, 2, 9)["input_ids"]
        x = base.embed_tokens(ids)
        tables = base.rotary_emb(x, position_ids=torch.arange(9)[None])
        for layer in base.layers:
            x = checkpoint(
                layer,
                x,
                position_embeddings=tables,
                attention_mask=None,
                use_reentrant=False,
            )
        base.norm(x).square().mean().backward()
        return gradients(m)

    compare(build("llama"), program, calls=2)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2"])
def test_without_rotary(name: str) -> None:
    from tests.programs.models import tiny, tiny_inputs

    model = tiny(name)
    inputs = tiny_inputs(model, labels=True)
    compare(model, lambda m: train_step(switch_on(m, False), inputs))
    compare(switch_on(tiny(name), False), lambda m: train_step(m, inputs), prepare=optimize)
