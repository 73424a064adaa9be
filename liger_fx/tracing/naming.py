"""What the sizes of a call's tensors are called, so that one graph serves many sizes.

model(input_ids=<2 x 7>, labels=<2 x 7>)       ->  [batch, sequence], [batch, sequence]
layer(<2 x 7 x 64>, attention_mask=<2 x 1 x 7 x 9>)
                                               ->  [batch, sequence, 64], [batch, 1, q, k]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from liger_fx.tracing.call import CallSpec, Namer, UnsupportedCall, is_mask

# The sizes that transformers models share between inputs, by the inputs' names.
_TRANSFORMERS_SIZES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch", "sequence"),
    "inputs_embeds": ("batch", "sequence", ""),
    "attention_mask": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "labels": ("batch", "sequence"),
    "decoder_input_ids": ("batch", "decoder_sequence"),
    "decoder_inputs_embeds": ("batch", "decoder_sequence", ""),
    "decoder_attention_mask": ("batch", "decoder_sequence"),
    "decoder_position_ids": ("batch", "decoder_sequence"),
    "encoder_outputs_last_hidden_state": ("batch", "sequence", ""),
    "input_features": ("batch",),
    "input_values": ("batch",),
}
_SOUNDS = frozenset(("input_features", "input_values"))
_SAYS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def adapted(model: nn.Module) -> nn.Module:
    """The model that PEFT put its adapters into, which is called as the whole is; else itself."""
    base = getattr(model, "get_base_model", None)
    found: nn.Module = model if base is None else base()
    return found


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers model, with a config that says how to call it, adapters
    around it or not."""
    return isinstance(adapted(model), PreTrainedModel)


def describe_call(block: nn.Module, arguments: Mapping[str, Any], *, inner: bool) -> CallSpec:
    """The kind of call that these named arguments make of the block; UnsupportedCall where no graph
    can serve it.

    inner: whether it is a block inside a model, which is handed hidden states.
    """
    if is_transformers(block) and "is_causal" in arguments:
        raise UnsupportedCall("is_causal, which rewrites the config while the call lasts")
    names = _Names(is_transformers(block), _image_sizes(getattr(block, "config", None)))
    if inner:
        names.take_hidden(arguments)
    elif names.is_transformers:
        names.take_inputs(arguments)
    return names.describe(arguments)


class _Names(Namer):
    """Names by what the inputs are called; a size whose name alone says nothing gets a hint.

    values: what the named sizes are in this call. image_sizes: heights and widths that the config
    names.
    """

    def __init__(self, is_transformers: bool, image_sizes: frozenset[int]) -> None:
        super().__init__()
        self.is_transformers, self.image_sizes = is_transformers, image_sizes
        self.values: dict[str, int] = {}
        self.hidden: torch.Tensor | None = None
        self.has_cache = False

    def take_inputs(self, arguments: Mapping[str, Any]) -> None:
        """Learn the sizes from the inputs that say what they are."""
        for name in _SAYS:
            value = arguments.get(name)
            if isinstance(value, torch.Tensor) and value.ndim == len(_TRANSFORMERS_SIZES[name]):
                for size, known in zip(value.shape, _TRANSFORMERS_SIZES[name], strict=True):
                    if known:
                        self.values.setdefault(known, int(size))
        self.has_cache = arguments.get("past_key_values") is not None

    def take_hidden(self, arguments: Mapping[str, Any]) -> None:
        """Learn them from the hidden states that a block inside a model is handed."""
        if not _SOUNDS.isdisjoint(arguments):
            return
        for value in arguments.values():
            if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point():
                self.hidden = value
                self.values = {"batch": int(value.shape[0]), "sequence": int(value.shape[1])}
                return

    def sizes(self, name: str, tensor: torch.Tensor) -> tuple[int | str, ...]:
        known: tuple[str, ...] = ()
        if tensor is self.hidden:
            known = ("batch", "sequence", "")
        elif self.is_transformers and self.hidden is None:
            known = _TRANSFORMERS_SIZES.get(name, ())
        elif self.hidden is not None and tensor.ndim < 4:
            # A row of one is broadcast over the batch, or the batch is one row: it may stay so.
            known = ("batch" if tensor.shape[:1] != (1,) else "", "sequence")
        elif self.hidden is not None:
            known = ("batch",)
        if name == "position_ids" and tensor.ndim == 3:  # of several axes: time, height, width
            known = ("", "batch", "sequence")
        known = (*known, *[""] * tensor.ndim)[: tensor.ndim]
        sizes = enumerate(zip(tensor.shape, known, strict=True))
        return tuple(self._size(name, dim, int(size), k, tensor) for dim, (size, k) in sizes)

    def _size(self, name: str, dim: int, size: int, known: str, tensor: torch.Tensor) -> int | str:
        if known and self.values.setdefault(known, size) == size:
            # With a cache the mask covers what the cache holds, too.
            if not (self.has_cache and name.endswith("attention_mask") and dim == 1):
                return known
        elif size == 1:  # perhaps a broadcast one (position_ids of all rows): taken as it is
            return 1
        if name == "pixel_values" and dim >= tensor.ndim - 2 and size in self.image_sizes:
            return size  # an image as the config has it: roots of it are taken, and remainders
        if tensor is self.hidden or (name in _TRANSFORMERS_SIZES and dim == 2):
            return size  # the width
        is_width = dim == tensor.ndim - 1 and tensor.is_floating_point() and tensor.ndim in (2, 3)
        if self.hidden is not None and is_width:  # of rotary tables: the rules want to know it
            return size
        named = f"{name}_{dim}"
        self.hints[named] = size
        if (is_mask(tensor) and dim > 1) or self.has_cache:
            self.loose.add(named)
        return named


def _image_sizes(config: Any) -> frozenset[int]:
    """The heights and widths of images that a config names, or one inside it."""
    parts = (config, *vars(config).values()) if isinstance(config, PreTrainedConfig) else ()
    found = [size for part in parts if (size := getattr(part, "image_size", None)) is not None]
    return frozenset(s for size in found for s in ([size] if isinstance(size, int) else size))
