"""The mask of a decoding step over a static cache, made by a handful of operations.

    attention_mask (batch, seen), or None where all is seen
 ->
    (batch, 1, 1, length of the cache): 0 for what is seen, -inf for what is not

A step that is one launch waits for it. transformers makes it by some thirty operations, of truth
values, which attention turns into such numbers in each layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
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
    text: Any = config.get_text_config()
    layers: Any = getattr(past_key_values, "layers", ())
    if (
        inputs_embeds.shape[1] == 1
        and type(past_key_values) is StaticCache
        and all(type(layer) is StaticLayer and layer.is_initialized for layer in layers)
        and _fits(attention_mask, layers[0])
        and _is_plain(text, others)
    ):
        mask = _mask(attention_mask, len(inputs_embeds), layers[0])
        return {"full_attention": mask} if hasattr(text, "layer_types") else mask
    return masking_utils.create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        **others,
    )


def _fits(seen: torch.Tensor | None, layer: StaticLayer) -> bool:
    return seen is None or (
        seen.ndim == 2 and seen.shape[1] <= layer.max_cache_len and seen.device == layer.keys.device
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


def _mask(seen: torch.Tensor | None, batch: int, layer: StaticLayer) -> torch.Tensor:
    length, device = layer.max_cache_len, layer.keys.device
    start = 0.0 if seen is None else -torch.inf
    mask = torch.full((batch, length), start, dtype=layer.keys.dtype, device=device)
    if seen is not None:
        mask[:, : seen.shape[1]].masked_fill_(seen != 0, 0)
    to_come = _positions(length, device) > layer.cumulative_length
    return mask.masked_fill_(to_come, -torch.inf)[:, None, None]


@functools.lru_cache(8)  # a launch less at each step
def _positions(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device)
