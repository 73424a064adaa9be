"""What transformers does for one new position of a sequence, in fewer operations on a GPU.

    attention of grouped heads    a mask, and keys and values repeated for each head of a group
 ->                               keys and values as they are
    update of a static cache      a range, plus the length so far: where to write
 ->                               written at the length so far, in one launch

The heads of a group ask as positions would, and share what they read; where that are too few groups
for the GPU, each asks for itself, by a kernel that parts the keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from liger_fx.kernels.static_cache import append_position

# What may be given beside the tensors; the last have no part in PyTorch's attention.
_OPTIONS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}


def attends_in_groups(
    interface: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]
) -> bool:
    """Whether PyTorch's attention is asked on a GPU for one position of grouped heads, with a mask
    that all of them share. (Where there is no mask transformers repeats none.)"""
    return (
        isinstance(mask, torch.Tensor)
        and not torch.compiler.is_compiling()
        and query.is_cuda
        and query.shape[2] == 1
        and query.shape[1] > key.shape[1]
        and mask.ndim == 4
        and mask.shape[1] == 1
        and interface is sdpa_attention_forward
        and options.keys() <= _OPTIONS
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
    batch, heads, _position, width = query.shape
    options: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout, "scale": scaling}
    if _leaves_room(batch * key.shape[1], query.device) and can_use_cudnn_attention(
        SDPAParams(query, key, value, mask, dropout, False, True)
    ):
        found = scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    else:
        grouped = query.reshape(batch, key.shape[1], -1, width)
        found = scaled_dot_product_attention(grouped, key, value, **options)
    return found.reshape(batch, 1, heads, -1), None


@functools.cache
def _leaves_room(groups: int, device: torch.device) -> bool:
    """Whether one program a group would leave more than half of a GPU idle."""
    if device.type != "cuda":
        return False
    return 2 * groups < torch.cuda.get_device_properties(device).multi_processor_count


def static_layer(cache: Any, key: torch.Tensor, place: int) -> StaticLayer | None:
    """The layer of a static cache that is there and takes one position of ``key`` (batch, kv_heads,
    1, head_dim); None if the cache's own code must see to it."""
    if type(cache) is not StaticCache or cache.offloading or torch.compiler.is_compiling():
        return None
    layer = cache.layers[place]
    if type(layer) is not StaticLayer or not layer.is_initialized or key.shape[2] != 1:
        return None
    if torch.is_grad_enabled():  # which may be recorded through the cache
        return None
    return None if key.device.type == "mps" else layer  # which knows no index_copy_


def append(
    layer: StaticLayer, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer.update(key, value)`` for one position."""
    append_position(layer.keys, layer.values, layer.cumulative_length, key, value)
    return layer.keys, layer.values
