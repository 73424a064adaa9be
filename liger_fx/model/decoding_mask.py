"""The mask of a decoding step over a static cache, made by a handful of operations.

    transformers: forty operations, a mask of truth values, which attention turns into numbers to add
    in each layer
 ->
    attention_mask (batch, seen)  ->  (batch, 1, 1, length of the cache): 0 where it looks, else -inf

A decoding step waits for it: what runs on the GPU is a launch, what comes before it is Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import masking_utils
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


def create_masks_for_generate(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    **others: Any,
) -> Any:
    """What transformers' function of that name gives, as numbers to add where that is one mask of
    one position over a static cache without windows."""
    text, layers = config.get_text_config(), getattr(past_key_values, "layers", ())
    if (
        attention_mask is not None
        and attention_mask.ndim == 2
        and inputs_embeds.shape[1] == 1
        and type(past_key_values) is StaticCache
        and all(type(layer) is StaticLayer and layer.is_initialized for layer in layers)
        and attention_mask.shape[1] <= layers[0].max_cache_len
        and attention_mask.device == layers[0].keys.device
        and _is_plain(text, others)
    ):
        mask = _mask(attention_mask, layers[0])
        return {"full_attention": mask} if hasattr(text, "layer_types") else mask
    return masking_utils.create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        **others,
    )


def _is_plain(text: Any, others: dict[str, Any]) -> bool:
    """Whether every layer looks at all that came before, by PyTorch's own attention."""
    windows = ("sliding_window", "attention_chunk_size")
    return (
        set(getattr(text, "layer_types", ("full_attention",))) == {"full_attention"}
        and (hasattr(text, "layer_types") or not any(getattr(text, n, None) for n in windows))
        and getattr(text, "is_causal", True)
        and text._attn_implementation == "sdpa"
        and ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
        and all(value is None for name, value in others.items() if name in _CHANGING)
    )


_CHANGING = ("or_mask_function", "and_mask_function", "block_sequence_ids")


def _mask(seen: torch.Tensor, layer: StaticLayer) -> torch.Tensor:
    length, device = layer.max_cache_len, seen.device
    seen = pad(seen.to(torch.bool), (0, length - seen.shape[1]))
    hidden = ~(seen & (torch.arange(length, device=device) <= layer.cumulative_length))
    mask = torch.zeros(hidden.shape, dtype=layer.keys.dtype, device=device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None, None]
