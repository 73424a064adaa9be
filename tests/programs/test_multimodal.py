"""Vision-language, speech and encoder-decoder models: optimize(model) without example inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.programs.models import ENCODER_DECODER, SPEECH, VISION_LANGUAGE, tiny, tiny_inputs
from tests.programs.support import compare, train_step

ALL = tuple(dict.fromkeys((*VISION_LANGUAGE, *SPEECH, *ENCODER_DECODER)))
WITH_TEXT = [n for n in ALL if n != "wav2vec2"]


@pytest.mark.parametrize("name", ALL)
def test_forward(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model)

    def program(m: Any) -> Any:
        with torch.no_grad():
            return m(**inputs).logits

    compare(model, program)


@pytest.mark.parametrize("name", ALL)
def test_training_step(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model, labels=True)
    compare(model, lambda m: train_step(m.train(), inputs))


@pytest.mark.parametrize("name", ALL)
def test_checkpointing(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model, labels=True)

    def program(m: Any) -> Any:
        m.activation_checkpointing_enable()
        return train_step(m.train(), inputs)

    compare(model, program)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_generate(name: str) -> None:
    model = tiny(name)
    inputs = {k: v for k, v in tiny_inputs(model).items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def program(m: Any) -> Any:
        found = m.generate(**inputs, **options)
        assert found.shape[1] >= 5
        return found

    compare(model, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_text_alone(name: str) -> None:
    """A question without an image goes to the language model only."""
    model = tiny(name)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def program(m: Any) -> Any:
        with torch.no_grad():
            return m(**inputs).logits

    compare(model, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_more_images(name: str) -> None:
    """First two images, then four, then none."""
    model = tiny(name)

    def program(m: Any) -> Any:
        results = []
        with torch.no_grad():
            for repeats in (1, 2):
                inputs = {
                    k: v.repeat(repeats, *[1] * (v.ndim - 1))
                    for k, v in tiny_inputs(m, seed=repeats).items()
                }
                results.append(m(**inputs).logits)
            ids = tiny_inputs(m)["input_ids"].clamp(max=80)
            results.append(m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        return results

    compare(model, program, calls=1)


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_parts(name: str) -> None:
    """The tower of images, by itself."""
    model = tiny(name)
    inputs = tiny_inputs(model)
    given = {
        k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")
    }

    def program(m: Any) -> Any:
        with torch.no_grad():
            found = m.get_image_features(**given)
        found = getattr(found, "pooler_output", found)
        return list(found) if isinstance(found, tuple | list) else found

    original = tiny(name)
    from tests.programs.support import optimize, run, same

    same(run(program, optimize(model)), run(program, original))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "moonshine"])
def test_the_encoder_alone_and_its_output_again(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model)
    text = inputs.pop("decoder_input_ids")

    def program(m: Any) -> Any:
        with torch.no_grad():
            encoded = m.get_encoder()(**inputs)
            rest = {k: v for k, v in inputs.items() if k == "attention_mask"}
            out = m(encoder_outputs=encoded, decoder_input_ids=text, **rest)
        return encoded[0], out.logits

    compare(model, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "t5", "whisper"])
def test_with_example_inputs(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model)

    def program(m: Any) -> Any:
        with torch.no_grad():
            return m(**inputs).logits

    compare(model, program, inputs=dict(inputs))
