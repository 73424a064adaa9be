"""What transformers does for one new position of a sequence, in fewer operations on a GPU.

   attention of grouped heads    a mask, and keys and values repeated for each head of a group
->                               keys and values as they are, where PyTorch takes them so
   update of a static cache      a range, plus the length so far: where to write
->                               the length so far
"""

from __future__ import annotations

from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# What may be given beside the tensors; the last have no part in PyTorch's attention.
_OPTIONS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}


def attends_in_groups(
    interface: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]
) -> bool:
    """Whether PyTorch's attention is asked for one position of grouped heads with a mask, and has a
    kernel for that which repeats none. (Where there is no mask transformers asks for one.)"""
    return (
        not torch.compiler.is_compiling()
        and isinstance(mask, torch.Tensor)
        and query.is_cuda
        and query.shape[2] == 1
        and query.shape[1] > key.shape[1]
        and interface is sdpa_attention_forward
        and options.keys() <= _OPTIONS
        and can_use_cudnn_attention(
            SDPAParams(query, key, value, mask, options.get("dropout", 0.0), False, True)
        )
    )


def attend_in_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of such a call: (batch, 1, heads, value_dim), and no weights."""
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return found.transpose(1, 2).contiguous(), None


def static_layer(cache: Any, key: torch.Tensor, place: int) -> StaticLayer | None:
    """The layer of a static cache that is there and takes one position of ``key`` (batch, kv_heads,
    1, head_dim); None if the cache's own code must see to it."""
    if torch.compiler.is_compiling() or type(cache) is not StaticCache or cache.offloading:
        return None
    layer = cache.layers[place]
    if type(layer) is not StaticLayer or not layer.is_initialized or key.shape[2] != 1:
        return None
    return None if key.device.type == "mps" else layer  # which knows no index_copy_


def append(
    layer: StaticLayer, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer.update(key, value)`` for one position."""
    place = layer.cumulative_length.view(1)
    layer.keys.index_copy_(2, place, key)
    layer.values.index_copy_(2, place, value)
    layer.cumulative_length.add_(1)
    return layer.keys, layer.values
