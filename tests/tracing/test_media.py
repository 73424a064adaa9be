"""Models of sounds and images, encoder-decoders, and models that carry their config by themselves:
their graphs, and what stays their own code."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import liger_fx
from liger_fx.errors import FallbackWarning
from liger_fx.tracing import leaves
from liger_fx.tracing.naming import describe_call
from tests.programs.models import tiny, tiny_inputs


def targets(block: Any) -> list[Any]:
    return [node.target for node in block.graph.nodes]


class CarriesConfig(PreTrainedModel):  # type: ignore[misc]
    """No module below it has a config."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        self.post_init()

    def cache(self) -> Cache:
        return DynamicCache(config=self.config)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        cache = self.cache()
        length = cache.get_seq_length()
        if length > 0:
            input_ids = input_ids * 0
        hidden = self.linear(input_ids[:, :, None].expand(-1, -1, 4).float() + length)
        cache.update(hidden[:, None], hidden[:, None], 0)
        return hidden, cache


class ChangesConfig(CarriesConfig):
    def cache(self) -> Cache:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = 3
        return DynamicCache(config=config)


class ChangesConfigByData(CarriesConfig):
    def cache(self) -> Cache:
        config = copy.deepcopy(self.config)
        config.custom = nn.Linear(1, 1)
        return DynamicCache(config=config)


IDS = torch.randint(3, 90, (3, 5))


@pytest.mark.parametrize("kind", [CarriesConfig, ChangesConfig])
def test_a_cache_is_laid_out_for_the_config_that_the_code_gives(kind: Any) -> None:
    model = kind(LlamaConfig(num_hidden_layers=2)).eval()
    traced = liger_fx.trace(model, {"input_ids": IDS})
    assert {"config", leaves.new_cache} <= set(targets(traced))
    ours, theirs = traced(input_ids=IDS[:2, :4]), model(input_ids=IDS[:2, :4])
    assert len(traced.plans) == 1
    assert torch.equal(ours[0], theirs[0])
    assert len(ours[1].layers) == len(theirs[1].layers) == (2 if kind is CarriesConfig else 3)
    assert model.config.num_hidden_layers == traced.config.num_hidden_layers == 2


def test_a_config_of_another_make_is_refused() -> None:
    model = ChangesConfigByData(LlamaConfig(num_hidden_layers=2)).eval()
    with pytest.raises(liger_fx.TraceError, match="a LlamaConfig that no module carries"):
        liger_fx.trace(model, {"input_ids": IDS})


class AsksNewCache(CarriesConfig):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        width, _ = self.cache().get_mask_sizes(input_ids.shape[1], 0)
        return input_ids.new_zeros(2, width)


def test_what_a_new_cache_says_of_a_size_is_no_constant() -> None:
    traced = liger_fx.trace(AsksNewCache(LlamaConfig(num_hidden_layers=2)), {"input_ids": IDS})
    assert [traced(input_ids=IDS[:, :n]).shape[1] for n in (5, 4, 2)] == [5, 4, 2]


class FillsCache(nn.Module):
    """A loop over the tokens, and a result that nobody reads."""

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        total = x[:, 0] * 0
        for i in range(int(x.shape[1])):
            total = total + x[:, i] * (1 if bool(x[0, i, 0] > 0) else 2)
        cache.update(x[:, None], x[:, None], 0)
        return total


class IgnoresResult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fill = FillsCache()

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        self.fill(x, cache)
        return x * 2


def test_a_called_module_that_is_given_a_cache_fills_it() -> None:
    traced = liger_fx.trace(IgnoresResult(), {"x": torch.randn(3, 5, 4), "cache": DynamicCache()})
    assert "fill" in targets(traced)
    cache, x = DynamicCache(), torch.randn(3, 6, 4)
    assert torch.equal(traced(x, cache), x * 2)
    assert cache.get_seq_length() == 6
    assert len(traced.plans) == 1


@pytest.mark.parametrize("name", ["whisper", "moonshine", "m2m_100"])
def test_an_encoder_decoder_is_graphs_all_through(name: str) -> None:
    model = tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", liger_fx.errors.NothingRewrittenWarning)
        opt = liger_fx.optimize(model)
    assert opt.report is not None and not opt.report.fallbacks
    assert opt.plans and opt.model.plans and opt.model.decoder.layers[0].plans
    inputs = tiny_inputs(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        torch.testing.assert_close(opt(**inputs).logits, model(**inputs).logits)


def test_the_features_of_a_sound_are_of_the_batch() -> None:
    model = tiny("whisper")
    inputs = tiny_inputs(model)
    for inner in (False, True):
        call = describe_call(model, inputs, inner=inner)
        sizes = call.tensors["input_features"].sizes
        assert sizes == ("batch", "input_features_1", 40)
        assert call.hints["input_features_1"] == 8
    assert call.tensors["decoder_input_ids"].sizes[0] == "batch"


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class SelectsRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Doubles(), Doubles()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x[x[:, 0] > 0])  # type: ignore[no-any-return]


def test_a_block_inside_that_is_given_a_size_of_the_data_says_so() -> None:
    traced = liger_fx.trace(SelectsRows(), {"x": torch.randn(3, 4)}, blocks=["layers.*"])
    (fallback,) = traced._block.planner.fallbacks
    assert "a size that only the data tell" in fallback.reason
    assert traced.layers[0].plans


def test_an_image_of_the_size_that_the_config_names_is_of_that_size() -> None:
    opt = liger_fx.optimize(tiny("internvl"))  # it takes the root of its number of patches
    assert opt.report is not None and not opt.report.fallbacks
    inputs = tiny_inputs(opt)
    pixels = inputs["pixel_values"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        opt(**inputs)
    assert len(opt.plans) == 1
    for given, sizes in ((pixels, (16, 16)), (pixels[..., :8], (16, "pixel_values_3"))):
        call = describe_call(opt, {**inputs, "pixel_values": given}, inner=False)
        assert call.tensors["pixel_values"].sizes[2:] == sizes


def test_positions_of_several_axes_are_no_batch_of_three() -> None:
    model = tiny("qwen2_vl").model.language_model
    arguments = {
        "inputs_embeds": torch.randn(3, 5, 32),
        "position_ids": torch.zeros(3, 3, 5, dtype=torch.long),
    }
    call = describe_call(model, arguments, inner=True)
    assert call.tensors["position_ids"].sizes == ("position_ids_0", "batch", "sequence")
