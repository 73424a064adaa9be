"""model.generate(): identical tokens, every step of the decoder by graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    StaticCache,
    TextIteratorStreamer,
)

from tests.programs.models import ENCODER_DECODER, tiny, tiny_inputs
from tests.programs.support import build, compare, make_inputs
from tests.support.families import FAMILIES

STEPS = 8
TWENTY = (*FAMILIES, "gpt2", "gpt_neox", "t5", "bart", "whisper", "phi", "stablelm")


def prompt(model: Any, batch: int = 2, length: int = 5) -> dict[str, Any]:
    """A prompt for any of these models; the second row begins with padding."""
    if model.config.model_type in ENCODER_DECODER:
        inputs = tiny_inputs(model)
        del inputs["decoder_input_ids"]
        return inputs
    upto = min(model.config.vocab_size, 90)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, upto, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(model: Any) -> dict[str, Any]:
    inputs = prompt(model, 2, 7)
    inputs["attention_mask"][1, :3] = 0
    inputs["input_ids"][1, :3] = 0
    return inputs


def tokens(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    found = model.generate(
        **inputs,
        **({"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False} | options),
    )
    assert isinstance(found, torch.Tensor) and found.shape[1] >= STEPS
    return found


@pytest.mark.parametrize("name", TWENTY)
def test_greedy(name: str) -> None:
    model = tiny(name)
    compare(model, lambda m: tokens(m, prompt(m)), calls=STEPS)


@pytest.mark.parametrize("name", [n for n in TWENTY if n not in ENCODER_DECODER])
def test_left_padding(name: str) -> None:
    model = tiny(name)
    compare(model, lambda m: tokens(m, left_padded(m)), calls=STEPS)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "nucleus": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked prefill": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2", "t5", "whisper"])
def test_ways_to_choose(name: str, way: str) -> None:
    if way == "chunked prefill" and name in ENCODER_DECODER:
        pytest.skip("transformers chunks the prompts of decoders only")
    model = tiny(name)
    compare(model, lambda m: tokens(m, prompt(m), **WAYS[way]), calls=STEPS)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_assisted(name: str) -> None:
    """A second, smaller model proposes; its own optimised twin does too."""

    def program(m: Any) -> Any:
        helper = build("llama", seed=1, num_hidden_layers=1)
        return tokens(m, prompt(m, 1), assistant_model=helper)

    compare(build(name), program)


@pytest.mark.slow
def test_assisted_by_an_optimised_model() -> None:
    from tests.programs.support import graph_runs, optimize, run, same

    model, twin_of = build("llama"), build("llama")
    helper, helper_twin = (build("llama", seed=1, num_hidden_layers=1) for _ in range(2))
    opt_helper = optimize(helper)

    def program(m: Any) -> Any:
        assistant = helper_twin if m is twin_of else opt_helper
        return tokens(m, prompt(m, 1), assistant_model=assistant)

    opt = optimize(model)
    theirs = run(program, twin_of)
    sites = 3  # two layers and the helper's one
    with graph_runs(opt, calls=2, rotary=sites):
        same(run(program, opt), theirs)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_prompt_lookup(name: str) -> None:
    def program(m: Any) -> Any:
        inputs = prompt(m, 1, 6)
        inputs["input_ids"][0, 3:] = inputs["input_ids"][0, :3]
        return tokens(m, inputs, prompt_lookup_num_tokens=2)

    compare(tiny(name), program)


CACHES = ["dynamic", "static", "offloaded", "sliding_window", "hybrid", "offloaded_static"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "qwen2"])
def test_caches(name: str, cache: str) -> None:
    if cache not in _implementations():
        pytest.skip(f"transformers has no cache implementation {cache!r} any more")
    if cache.startswith("offloaded"):
        pytest.skip("offloaded caches need an accelerator")
    compare(
        tiny(name),
        lambda m: tokens(m, prompt(m), cache_implementation=cache),
        calls=STEPS,
    )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_static_cache_of_an_encoder_decoder(name: str) -> None:
    """T5 asks the cache for a tensor: its attention is tried on data, and not on the cache's."""
    compare(
        tiny(name),
        lambda m: tokens(m, prompt(m), cache_implementation="static"),
    )


def _implementations() -> tuple[str, ...]:
    from transformers.generation import configuration_utils as module

    return (
        *module.ALL_CACHE_IMPLEMENTATIONS,
        *getattr(module, "DEPRECATED_CACHE_IMPLEMENTATIONS", ()),
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "deepseek_v3"])
def test_a_cache_handed_from_call_to_call(name: str) -> None:
    """A loop of one's own: prefill, then a token at a time, then several at once."""

    def program(m: Any) -> Any:
        ids = prompt(m)["input_ids"]
        results = []
        with torch.no_grad():
            out = m(ids, use_cache=True)
            results.append(out)
            for _ in range(3):
                step = out.logits[:, -1:].argmax(-1)
                out = m(step, past_key_values=out.past_key_values, use_cache=True)
                results.append(out.logits)
            several = torch.cat([step, step, step], dim=1)
            out = m(several, past_key_values=out.past_key_values)
            results += [out.logits, out.past_key_values]
        return results

    compare(tiny(name), program, calls=5)


@pytest.mark.parametrize("kind", ["dynamic", "static", "config"])
def test_a_cache_of_ones_own(kind: str) -> None:
    def program(m: Any) -> Any:
        inputs = prompt(m)
        if kind == "static":
            cache: Any = StaticCache(config=m.config, max_cache_len=32)
        else:
            cache = DynamicCache(**({"config": m.config} if kind == "config" else {}))
        first = tokens(m, inputs, past_key_values=cache)
        length = cache.get_seq_length()
        more = {"input_ids": torch.cat([first, inputs["input_ids"]], dim=1)}
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        return first, int(length), tokens(m, more, past_key_values=cache)

    compare(build("llama"), program, calls=2 * STEPS)


def test_an_encoder_decoder_cache() -> None:
    def program(m: Any) -> Any:
        inputs = prompt(m)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = torch.zeros(2, 1, dtype=torch.long)
        with torch.no_grad():
            encoded = m.get_encoder()(**inputs)
            out = m(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=start,
                past_key_values=cache,
                use_cache=True,
            )
            step = out.logits[:, -1:].argmax(-1)
            again = m(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=step,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        return out.logits, again

    for name in ("t5", "bart"):
        compare(tiny(name), program)


def test_a_cropped_and_a_reordered_cache() -> None:
    def program(m: Any) -> Any:
        ids = prompt(m, 2, 8)["input_ids"]
        with torch.no_grad():
            cache = m(ids).past_key_values
            cache.crop(-3)
            cropped = m(ids[:, 5:], past_key_values=cache)
            cropped.past_key_values.reorder_cache(torch.tensor([1, 0]))
            swapped = m(ids[:, :1], past_key_values=cropped.past_key_values)
        return cropped.logits, swapped

    compare(build("llama"), program, calls=3)


def test_a_cache_in_training() -> None:
    """A prefix whose keys and values are learned: gradients go through the cache."""

    def program(m: Any) -> Any:
        ids = prompt(m)["input_ids"]
        first = m(ids, use_cache=True)
        second = m(ids, past_key_values=first.past_key_values)
        second.logits.square().mean().backward()
        from tests.programs.support import gradients

        return second.logits, gradients(m)

    compare(build("llama"), program, calls=2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_outputs_as_a_dictionary(name: str) -> None:
    def program(m: Any) -> Any:
        out = m.generate(
            **prompt(m),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
        )
        return {k: v for k, v in out.items() if k != "past_key_values"}

    compare(tiny(name), program, calls=4)


def test_embeds_and_a_streamer() -> None:
    class Tokens(TextIteratorStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Any) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    def program(m: Any) -> Any:
        streamer = Tokens()
        embeds = m.get_input_embeddings()(prompt(m, 1)["input_ids"]).detach()
        given = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
        return tokens(m, given, streamer=streamer), streamer.seen

    compare(build("llama"), program, calls=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_continuous_batching(name: str) -> None:
    """Requests of several lengths, packed into one batch over a paged cache."""
    requests = [[5, 6, 7], [8, 9, 10, 11, 12], [13] * 7]

    def program(m: Any) -> Any:
        config = GenerationConfig(
            max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        # by default most of the machine's memory becomes the cache
        room = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=64)
        found = m.generate_batch(
            inputs=requests, generation_config=config, continuous_batching_config=room
        )
        assert len(found) == len(requests)
        ordered = sorted(found.values(), key=lambda request: len(request.prompt_ids))
        results = [list(request.generated_tokens) for request in ordered]
        assert all(len(row) == 4 for row in results), results
        return results

    compare(tiny(name), program)


@pytest.mark.slow
def test_many_in_turn() -> None:
    """One model generates in one way after another."""

    def program(m: Any) -> Any:
        results = [tokens(m, prompt(m, batch, length)) for batch, length in ((1, 3), (3, 9))]
        results.append(tokens(m, left_padded(m), num_beams=2))
        inputs = make_inputs(m, 2, 9, labels=True)
        results.append(m.train()(**inputs).loss)
        results.append(tokens(m.eval(), prompt(m)))
        return results

    compare(build("llama"), program, calls=4 * STEPS + 1)
