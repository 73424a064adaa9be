"""Attention of one position over grouped heads, without copies of the keys and values.

    query (batch, 32, 1, head_dim), keys and values (batch, 8, length, head_dim), a mask
 ->
    query (batch, 8, 4, head_dim): the heads of a group ask as positions would, with one mask

transformers repeats keys and values for each head of a group where there is a mask (from 5.20 on it
does as here). A decoding step reads little else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import sdpa_attention

_IS_NEEDED = not hasattr(sdpa_attention, "pack_gqa")
_KNOWN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}


def asks_as_group(
    interface: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]
) -> bool:
    """Whether PyTorch's attention is asked for one position of grouped heads with a mask that all
    heads share."""
    return (
        _IS_NEEDED
        and interface is sdpa_attention.sdpa_attention_forward
        and isinstance(mask, torch.Tensor)
        and query.shape[2] == 1
        and mask.ndim == 4
        and mask.shape[1] == 1
        and query.shape[1] > key.shape[1] == value.shape[1]
        and options.keys() <= _KNOWN
        and not torch.compiler.is_compiling()
    )


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of such a call: (batch, 1, heads, value_dim), and no weights."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    found = scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return found.reshape(batch, 1, heads, -1), None
