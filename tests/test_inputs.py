"""The inputs that are made for a model: every kind of transformers model runs with them."""

from __future__ import annotations

import pytest
import torch
import transformers

from liger_fx.errors import UsageError
from liger_fx.inputs import SHAPES, example_arguments, example_inputs
from tests.programs.models import ENCODER_DECODER, SPEECH, VISION_LANGUAGE, tiny

ALL = tuple(dict.fromkeys((*VISION_LANGUAGE, *SPEECH, *ENCODER_DECODER, "llama", "gpt2")))


@pytest.mark.parametrize("name", ALL)
def test_the_model_takes_them(name: str) -> None:
    model = tiny(name)
    for i, shape in enumerate(SHAPES):
        inputs = example_inputs(model, *shape, seed=i)
        with torch.no_grad():
            out = model(**inputs)
        assert out.logits.shape[0] == shape[0]
        assert "labels" not in inputs or bool(out.loss.isfinite())


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_a_vision_language_model_is_given_images(name: str) -> None:
    inputs = example_arguments(tiny(name), None)
    assert {"input_ids", "pixel_values"} <= inputs.keys() and "labels" not in inputs


def test_a_tower_of_images_is_given_images() -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config)
    inputs = example_arguments(model, None)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {"pixel_values": (3, 3, 16, 16)}
    model(**inputs)


def test_the_model_is_as_it_was() -> None:
    model = tiny("llava").train()
    example_arguments(model, None)
    assert all(module.training for module in model.modules())


def test_where_none_can_be_made_it_says_what_to_pass() -> None:
    class Strange(transformers.LlamaPreTrainedModel):  # type: ignore[misc]
        def forward(self, voltages: torch.Tensor) -> torch.Tensor:
            return voltages

    with pytest.raises(UsageError, match="No inputs can be made for a Strange: pass inputs="):
        example_arguments(Strange(transformers.LlamaConfig()), None)
