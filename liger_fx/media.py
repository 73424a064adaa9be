"""Images and sounds to run a model with, made from what its config says of them.

LlavaForConditionalGeneration     ->   pixel_values (batch, channels, height, width)
Qwen2VLForConditionalGeneration   ->   pixel_values (patches, numbers in one), image_grid_thw
WhisperForConditionalGeneration   ->   input_features (batch, num_mel_bins, frames)
Wav2Vec2ForCTC                    ->   input_values (batch, samples)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from liger_fx.model.tree import copy_tree, plain_module

Tensors = dict[str, torch.Tensor]
_GRID = 4  # patches along each side of an image that may be of any size
_FIRST = ("vision_config", "audio_config", "encoder_config", "encoder")


def parts(config: Any) -> Iterator[Any]:
    """The configs inside a config, those of images and sounds first, and itself last."""
    inner = {k: v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    for name in (*(n for n in _FIRST if n in inner), *(n for n in inner if n not in _FIRST)):
        yield from parts(inner[name])
    yield config


def told(config: Any, *names: str) -> Any:
    """The first of these fields that is set anywhere in the config; None if none is."""
    for name in names:
        for part in parts(config):
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def names_of(function: Any) -> Any:
    """The parameters of a forward by name."""
    return inspect.signature(function).parameters


def images(model: Any, batch: int, generator: torch.Generator) -> Tensors:
    """An image for each row, as the model's processor hands them over; nothing for a model whose
    config does not say how large they are."""
    names, config = names_of(type(model).forward), model.config
    channels = told(config, "num_channels", "in_channels", "in_chans") or 3
    if "pixel_values" not in names:
        return {}
    if "image_grid_thw" in names:
        return _patches(config, channels, batch, generator)
    size = told(config, "image_size")
    if size is None:
        return {}
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape: tuple[int, ...] = (batch, channels, height, width)
    if "pixel_attention_mask" in names:  # a row may have several images
        shape = (batch, 1, channels, height, width)
    made = {"pixel_values": torch.randn(shape, generator=generator)}
    if "image_sizes" in names and _tower_takes(model, "image_sizes"):
        made["image_sizes"] = torch.tensor([[height, width]] * batch)
    return made


def _patches(config: Any, channels: int, batch: int, generator: torch.Generator) -> Tensors:
    """Images of any size, cut into patches, each a row of numbers."""
    patch, frames = told(config, "patch_size"), told(config, "temporal_patch_size") or 1
    merge = told(config, "spatial_merge_size", "merge_size") or 1
    side = max(_GRID // merge, 1) * merge
    shape = (batch * side * side, channels * frames * patch * patch)
    return {
        "pixel_values": torch.randn(shape, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
    }


def _tower_takes(model: nn.Module, name: str) -> bool:
    """Whether a module inside that takes images and no text takes this, too."""
    for module in model.modules():
        names = names_of(type(module).forward)
        if name in names and "pixel_values" in names and "input_ids" not in names:
            return True
    return False


def tokens_an_image(model: nn.Module, given: Tensors, batch: int) -> int | None:
    """How many tokens of the text stand for one image; None for a model that cannot tell.

    Its own code is asked, on a copy around the same weights: what is left of an image after
    patches, merging, pooling and cropping is no field of a config.
    """
    twin = copy_tree(model, plain_module).eval()
    find = getattr(twin, "get_image_features", None)
    if find is None or any(p.is_meta for p in model.parameters()):
        return None
    names = names_of(find)
    try:
        with torch.no_grad():
            found = find(**{name: value for name, value in given.items() if name in names})
    except Exception:  # it may want what no config tells of
        return None
    found = getattr(found, "pooler_output", found)
    features = found if isinstance(found, (list, tuple)) else [found]
    count: int = sum(f.shape[:-1].numel() for f in features)
    return None if count % batch else count // batch


def sounds(model: Any, batch: int, length: int, generator: torch.Generator) -> Tensors:
    """A sound for each row, of some ``length`` frames: samples, or features of each frame."""
    names, config = names_of(type(model).forward), model.config
    strides, reach = _convolutions(model)
    if "input_features" in names:
        if (
            width := told(config, "feature_projection_input_dim", "input_feat_per_channel")
        ) is None:
            return _spectrogram(config, batch, strides, generator)
        shape: tuple[int, ...] = (batch, length * strides, width)
        return {"input_features": torch.randn(shape, generator=generator)}
    if "input_values" in names:
        mels, longest = told(config, "num_mel_bins"), told(config, "max_length")
        shape = (batch, length * strides + reach)
        if mels and _tower_patches(model):
            shape = (batch, longest, mels)
        return {"input_values": torch.randn(shape, generator=generator)}
    return {}


def _spectrogram(config: Any, batch: int, strides: int, generator: torch.Generator) -> Tensors:
    """Features over time, of the one length that such an encoder takes."""
    mels, places = told(config, "num_mel_bins"), told(config, "max_source_positions")
    if mels is None or places is None:
        return {}
    shape = (batch, mels, places * strides)
    return {"input_features": torch.randn(shape, generator=generator)}


def _convolutions(model: nn.Module) -> tuple[int, int]:
    """By how much a model's convolutions over time shorten a sound, and what the first frame
    needs beyond that."""
    strides, reach = 1, 0
    for module in model.modules():
        if type(module) is nn.Conv1d and module.stride[0] > 1:
            reach += (module.kernel_size[0] - 1) * strides
            strides *= module.stride[0]
    return strides, reach


def _tower_patches(model: nn.Module) -> bool:
    """Whether the model looks at a sound's spectrogram as at an image."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())
