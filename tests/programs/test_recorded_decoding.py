"""generate() with a static cache: steps are recorded once, replayed, and the tokens are the same.

On the CPU a tape stands for the CUDA graph (tests/support/tape.py).
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, StaticCache, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import liger_fx
from liger_fx.errors import FallbackWarning
from liger_fx.model import decoding
from liger_fx.tracing import leaves
from liger_fx.tracing.one_position import attend_in_groups
from tests.programs.models import ENCODER_DECODER, tiny
from tests.programs.support import build, same
from tests.programs.test_generate import left_padded, prompt, tokens
from tests.support.tape import Tape, recording_on_cpu

STEPS = 16
STATIC: dict[str, Any] = {
    "cache_implementation": "static",
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
}


@pytest.fixture
def tapes() -> Iterator[list[Tape]]:
    """The tapes that a test makes; a warning that it does not expect fails it."""
    with recording_on_cpu() as made, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield made


def replays(tapes: list[Tape]) -> list[int]:
    return [tape.replays for tape in tapes]


def unrecorded(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    return tokens(model, inputs, **(STATIC | {"disable_compile": True} | options))


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt2", "whisper"]
)
def test_the_same_tokens(name: str, tapes: list[Tape]) -> None:
    """The first step of a kind runs as any call; of a second cache all are replayed."""
    model = tiny(name)
    opt = liger_fx.optimize(model)
    inputs = prompt(model) if name in ENCODER_DECODER else left_padded(model)
    expected = unrecorded(model, inputs)
    for _ in range(2):
        assert torch.equal(tokens(opt, inputs, **STATIC), expected)
    assert replays(tapes) == [STEPS - 2, STEPS - 1]


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "a dictionary": {
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_hidden_states": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_ways_to_choose(name: str, way: str, tapes: list[Tape]) -> None:
    model = tiny(name)
    opt = liger_fx.optimize(model)
    found: list[Any] = []
    for one, off in ((opt, True), (opt, False)):
        torch.manual_seed(5)
        options = STATIC | WAYS[way] | {"do_sample": WAYS[way].get("do_sample", False)}
        found.append(one.generate(**prompt(model), **options, disable_compile=off))
    # a sliding window is full in the midst
    assert len(tapes) == (2 if name == "gemma2" else 1) and sum(replays(tapes)) == STEPS - 2
    if way != "a dictionary":
        assert torch.equal(*found)
        return
    for name in ("sequences", "logits", "hidden_states"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["beams", "assisted", "chunked prefill"])
def test_ways_that_transformers_does_not_compile(way: str, tapes: list[Tape]) -> None:
    """Beam search and assisted generation call the model itself; a chunk is no decoding step."""
    model = build("llama")
    opt = liger_fx.optimize(model)
    options: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "assisted": {"assistant_model": build("llama", seed=1), "cache_implementation": None},
        "chunked prefill": {"prefill_chunk_size": 2},
    }[way]
    inputs = prompt(model, 1, 8)
    assert torch.equal(
        tokens(opt, inputs, **(STATIC | options)), unrecorded(model, inputs, **options)
    )
    assert replays(tapes) == ([STEPS - 2] if way == "chunked prefill" else [])


def test_the_caches_own_beams_are_reordered(tapes: list[Tape]) -> None:
    """A reordered cache has other tensors: its step is recorded anew."""
    model = build("llama")
    opt = liger_fx.optimize(model)
    found = []
    for one in (model, opt):
        cache = StaticCache(config=model.config, max_cache_len=32)
        ids = prompt(model, 2, 6)["input_ids"]
        call = opt.get_compiled_call(None) if one is opt else model
        with torch.no_grad():
            logits = [one(ids, past_key_values=cache).logits[:, -1:]]
            for step in range(9):
                if step == 5:
                    cache.reorder_cache(torch.tensor([1, 0]))
                mask = torch.arange(32)[None, None, None] <= cache.get_seq_length()
                at = torch.as_tensor(cache.get_seq_length()).expand(2, 1).clone()
                token = logits[-1].argmax(-1)
                out = call(
                    input_ids=token,
                    attention_mask=mask.expand(2, -1, -1, -1).contiguous(),
                    position_ids=at,
                    past_key_values=cache,
                )
                logits.append(out.logits)
                assert out.past_key_values is cache
        found.append(torch.cat(logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert replays(tapes) == [4, 4]


def test_results_are_the_callers(tapes: list[Tape]) -> None:
    """A later step does not write over what an earlier one returned."""
    opt = liger_fx.optimize(build("llama"))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    call = decoding.Decoding.step

    def step(self: Any, block: Any, device: str, /, **given: Any) -> Any:
        out = call(self, block, device, **given)
        seen.append((out.logits, out.logits.clone()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.Decoding, "step", step)
        tokens(opt, prompt(opt), **STATIC)
    assert len(seen) == STEPS - 1
    assert all(torch.equal(kept, copied) for kept, copied in seen)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_cache_over_several_generations(name: str, tapes: list[Tape]) -> None:
    model = tiny(name)
    opt = liger_fx.optimize(model)
    results = []
    for one in (model, opt):
        cache = StaticCache(config=model.config, max_cache_len=64)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "past_key_values": cache}
        first = tokens(one, prompt(model), **options)
        more = {"input_ids": torch.cat([first, prompt(model)["input_ids"]], dim=1)}
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        second = tokens(one, more, **options)
        cache.reset()
        results.append((first, second, tokens(one, prompt(model), **options)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*reversed(results), strict=True))
    if name == "llama":
        assert replays(tapes) == [4 + 5 + 5]


def test_batches_and_lengths_change(tapes: list[Tape]) -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    for batch, length, new in ((1, 5, 8), (3, 5, 8), (1, 9, 8), (1, 5, 8), (2, 30, 20), (3, 5, 8)):
        inputs, options = prompt(model, batch, length), {"max_new_tokens": new}
        options["min_new_tokens"] = new
        expected = unrecorded(model, inputs, **options)
        assert torch.equal(tokens(opt, inputs, **(STATIC | options)), expected)
    assert all(tape.replays for tape in tapes) and len(tapes) == 6


def test_recordings_go_with_their_caches(tapes: list[Tape]) -> None:
    """And no more are kept than a few, those used last."""
    model = build("llama")
    opt = liger_fx.optimize(model)
    tokens(opt, prompt(model), **STATIC)
    kept = opt._block.decoding._recordings
    assert not kept
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(decoding.MOST + 2)]
    gone = [weakref.ref(cache) for cache in caches]
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    for cache in caches:
        tokens(opt, prompt(model), past_key_values=cache, **options)
    assert len(kept) == decoding.MOST
    del caches, cache
    assert not kept and not any(ref() for ref in gone)


def test_recordings_go_with_the_model(tapes: list[Tape]) -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    tokens(opt, prompt(model), past_key_values=cache)
    (recording,) = (weakref.ref(r) for r in opt._block.decoding._recordings.values())
    del opt
    gc.collect()
    assert recording() is None and cache.get_seq_length()


def test_copies_record_for_themselves(tapes: list[Tape]) -> None:
    opt = liger_fx.optimize(build("llama"))
    expected = tokens(opt, prompt(opt), **STATIC)
    twin = copy.deepcopy(opt)
    assert torch.equal(tokens(twin, prompt(opt), **STATIC), expected)
    assert twin._block.decoding is not opt._block.decoding and len(tapes) == 2


# -- one position, in fewer operations -------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("more", [0, 2, None], ids=["as seen", "too long", "none"])
def test_the_mask_is_that_of_transformers(name: str, more: int | None) -> None:
    """As numbers to add; of a mask that says more than was seen, too, and of none."""
    model = tiny(name)
    opt = liger_fx.optimize(model)
    cache = StaticCache(config=model.config, max_cache_len=20)
    given = left_padded(model)
    opt(**given, past_key_values=cache)
    ones = torch.ones(2, 1 + (more or 0), dtype=torch.long)
    mask = None if more is None else torch.cat([given["attention_mask"], ones], dim=1)
    call = {
        "config": model.config,
        "inputs_embeds": torch.empty(2, 1, 0),
        "attention_mask": mask,
        "past_key_values": cache,
    }
    theirs: Any = masking_utils.create_masks_for_generate(**call)
    ours: Any = opt.create_masks_for_generate(**call)
    if name == "qwen3":
        (theirs,), (ours,) = theirs.values(), ours.values()
    assert ours.is_floating_point() and theirs.dtype is torch.bool
    assert torch.equal(ours == 0, theirs) and torch.equal(ours == -torch.inf, ~theirs)


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_masks_of_windows_are_transformers(name: str) -> None:
    model = tiny(name)
    opt = liger_fx.optimize(model)
    found = [
        m.prepare_inputs_for_generation(
            prompt(model)["input_ids"],
            next_sequence_length=1,
            past_key_values=StaticCache(config=model.config, max_cache_len=20),
            attention_mask=prompt(model)["attention_mask"],
        )["attention_mask"]
        for m in (model, opt)
    ]
    same(found[1], found[0])


@pytest.mark.parametrize("masked", [torch.bool, torch.float32], ids=str)
def test_grouped_heads_share_what_they_read(masked: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(3, 8, 1, 16, generator=generator)
    key, value = (torch.randn(3, 2, 11, 16, generator=generator) for _ in range(2))
    seen = torch.arange(11).expand(3, 1, 1, 11) < torch.tensor([4, 11, 7])[:, None, None, None]
    mask = seen if masked is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    module = nn.Module()
    module.num_key_value_groups = 4
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    ours, _ = attend_in_groups(query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_position_is_appended_as_the_cache_does() -> None:
    caches = [StaticCache(config=build("llama").config, max_cache_len=8) for _ in range(2)]
    generator = torch.Generator().manual_seed(2)
    for length in (3, 1, 1, 2, 1):
        key, value = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(2))
        theirs = caches[0].update(key, value, 1)
        ours = leaves.cache_call(caches[1], "update", key, value, 1)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours[0] is caches[1].layers[1].keys
    lengths = [[int(layer.get_seq_length()) for layer in cache.layers] for cache in caches]
    assert lengths == [[0, 8], [0, 8]]


# -- what was recorded changes ---------------------------------------------------------------------


def another_weight(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(-weight.detach())


def moved_weights(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)


def eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def another_module(model: Any) -> None:
    other = copy.deepcopy(model.model.layers[1].mlp)
    with torch.no_grad():
        other.down_proj.weight.neg_()
    model.model.layers[1].mlp = other


CHANGES = [another_weight, moved_weights, in_place, eager_attention, another_module]
VISIBLE = (another_weight, in_place, another_module)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_are_seen(change: Any, tapes: list[Tape]) -> None:
    """Between two generations with one cache, and in the midst of one."""
    model = build("llama")
    opt = liger_fx.optimize(model)
    expected: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    for one, results in ((copy.deepcopy(opt), expected), (opt, found)):
        off = one is not opt
        cache = StaticCache(config=model.config, max_cache_len=32)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "disable_compile": off}
        results.append(tokens(one, prompt(model), past_key_values=cache, **options))
        change(one)
        cache.reset()
        results.append(tokens(one, prompt(model), past_key_values=cache, **options))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert len(tapes) == (1 if change is in_place else 2)
    assert change not in VISIBLE or not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("change", VISIBLE)
def test_changes_in_the_midst_of_a_generation(change: Any, name: str, tapes: list[Tape]) -> None:
    """A step that was replayed before the change was seen is taken back, and done anew."""
    opt = liger_fx.optimize(tiny(name))
    found = []
    for one, off in ((copy.deepcopy(opt), True), (opt, False)):

        def at_once(ids: Any, scores: torch.Tensor, one: Any = one) -> torch.Tensor:
            if ids.shape[1] == 12:
                change(one)
            return scores

        options = STATIC | {"disable_compile": off}
        found.append(tokens(one, prompt(one), logits_processor=[at_once], **options))
    assert torch.equal(*found)
    assert len(tapes) == 1 + (change is not in_place) + (name == "gemma2")


def test_adapters_are_switched(tapes: list[Tape]) -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    opt = liger_fx.optimize(model)
    layers = [m for m in opt.modules() if hasattr(m, "set_adapter") and hasattr(m, "lora_A")]
    cache = StaticCache(config=model.config, max_cache_len=32)

    def generated() -> torch.Tensor:
        cache.reset()
        options = {"max_new_tokens": 8, "min_new_tokens": 8}
        found = tokens(opt, prompt(model), past_key_values=cache, **options)
        assert torch.equal(unrecorded(opt, prompt(model), **options), found)
        return found

    found = []
    for name in ("a", "b", "a"):
        for layer in layers:
            layer.set_adapter(name)
        found.append(generated())
    for layer in layers:
        layer.scaling["a"] = 9.0
    found.append(generated())
    for layer in layers:
        layer.merge()
    generated()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[2], found[3])


# -- what cannot be recorded -----------------------------------------------------------------------


class Asking(nn.Module):
    """Its code depends on numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.isfinite().all()) else x.nan_to_num()


class Counting(nn.Module):
    """Its code counts in Python."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + self.calls / 100)


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Asking, "asks for the numbers in a tensor"), (Counting, "changes attributes")],
)
def test_code_that_cannot_be_recorded_is_told_once(module: Any, reason: str) -> None:
    model = build("llama")
    model.model.norm = nn.Sequential(model.model.norm, module())
    twin = copy.deepcopy(model)
    opt = liger_fx.optimize(model)
    twin = liger_fx.optimize(twin)
    with recording_on_cpu() as tapes, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            expected = unrecorded(twin, prompt(model))
            assert torch.equal(tokens(opt, prompt(model), **STATIC), expected)
    (warning,) = (w for w in told if "CUDA graph" in str(w.message))
    assert reason in str(warning.message) and warning.category is FallbackWarning
    assert not any(replays(tapes)) and len(tapes) == 1


def test_a_hook_is_run_at_each_step() -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    expected = tokens(opt, prompt(model), **STATIC)
    calls: list[int] = []
    with recording_on_cpu() as tapes:
        handle = opt.model.layers[0].register_forward_hook(lambda *given: calls.append(1))
        with pytest.warns(FallbackWarning, match=r"a hook stands on model\.layers\.0"):
            assert torch.equal(tokens(opt, prompt(model), **STATIC), expected)
        assert len(calls) == STEPS and not tapes
        handle.remove()
        assert torch.equal(tokens(opt, prompt(model), **STATIC), expected)
        assert replays(tapes) == [STEPS - 1]


def test_parts_elsewhere_are_not_recorded() -> None:
    opt = liger_fx.optimize(build("llama"))
    opt.model.layers[0].register_buffer("elsewhere", torch.empty(1, device="meta"))
    with recording_on_cpu() as tapes, pytest.warns(FallbackWarning, match="elsewhere is on meta"):
        tokens(opt, prompt(opt), **STATIC)
    assert not tapes


def test_a_way_to_compile_that_is_asked_for_is_kept(tapes: list[Tape]) -> None:
    opt = liger_fx.optimize(build("llama"))
    call = opt.get_compiled_call(CompileConfig(backend="eager"))
    assert call is opt._compiled_call and opt._block.decoding is None
    assert opt.get_compiled_call(None) is not call
