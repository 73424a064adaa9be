"""The result answers as the original does: classes and fields, caches, generate()."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.support.accuracy import relative
from tests.support.families import FAMILIES, make_inputs
from tests.support.pairs import fresh, pair

ROUNDING = 3e-6


def alike(ours: Any, theirs: Any, path: str = "output") -> None:
    """Asserts that two outputs have the same types, fields and (to rounding) values."""
    assert type(ours) is type(theirs), path
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        assert ours.requires_grad == theirs.requires_grad, path
        assert relative(ours, theirs) < ROUNDING, path
    elif isinstance(theirs, dict):  # every ModelOutput is one
        assert list(ours) == list(theirs), path
        for name in theirs:
            alike(ours[name], theirs[name], f"{path}.{name}")
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs), path
        for i, value in enumerate(theirs):
            alike(ours[i], value, f"{path}[{i}]")
    elif hasattr(theirs, "layers"):  # a cache
        for i, layer in enumerate(theirs.layers):
            assert type(ours.layers[i]) is type(layer), f"{path}.layers[{i}]"
            alike(ours.layers[i].keys, layer.keys, f"{path}.layers[{i}].keys")
            alike(ours.layers[i].values, layer.values, f"{path}.layers[{i}].values")
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("name", FAMILIES)
def test_same_class_and_fields(name: str) -> None:
    model, opt = pair(name)
    inputs = make_inputs(model, 2, 9, pad=True)
    theirs = model(**inputs)
    assert theirs.past_key_values is not None, "the original returns a cache by default"
    alike(opt(**inputs), theirs)
    inputs = make_inputs(model, 2, 9, pad=True, labels=True)
    alike(opt(**inputs), model(**inputs))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"return_dict": False},
        {"logits_to_keep": 1},
        {"output_hidden_states": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_same_answer_with_options(name: str, options: dict[str, Any]) -> None:
    """Served by a graph of its own or by the original forward, the answer is the same."""
    model, opt = fresh(name)  # output_hidden_states leaves transformers' hooks on a model
    inputs = make_inputs(model, 2, 9, pad=True) | options
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alike(opt(**inputs), model(**inputs))


def test_positional_arguments() -> None:
    model, opt = pair("llama")
    inputs = make_inputs(model, 2, 9, pad=True)
    arguments = (inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        alike(opt(*arguments), model(*arguments))


def test_no_gradients_where_none_are_wanted() -> None:
    model, opt = pair("llama")
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        assert not opt(**inputs).logits.requires_grad
    assert opt(**inputs).logits.requires_grad
    with torch.inference_mode():
        assert opt(**inputs).logits.is_inference()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_is_token_identical(name: str) -> None:
    model, opt = pair(name)
    inputs = make_inputs(model, 2, 5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (m.generate(**inputs, **options) for m in (opt, model))
    assert theirs.shape == (2, 17)
    assert torch.equal(ours, theirs)


def test_generate_samples_and_beams_the_same() -> None:
    model, opt = pair("qwen3")
    inputs = make_inputs(model, 2, 5)
    for options in ({"do_sample": True, "top_k": 20}, {"num_beams": 3}):
        tokens = []
        for m in (opt, model):
            torch.manual_seed(0)
            tokens.append(m.generate(**inputs, max_new_tokens=8, **options))
        assert torch.equal(*tokens)


def test_a_call_that_no_graph_serves_says_so_once() -> None:
    model, opt = fresh("llama")
    inputs = make_inputs(model, 2, 5)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            theirs = model(**inputs, is_causal=True)[0]
            torch.testing.assert_close(opt(**inputs, is_causal=True)[0], theirs)
    ours = [w for w in told if "Fallback" in w.category.__name__ and "CausalLM" in str(w.message)]
    assert len(ours) == 1
    assert "is_causal" in str(ours[0].message)
