"""The functions a traced graph calls where the trace does not go inside.

Each is importable by name, so that a graph can be printed, saved and read back, and each looks up
what it needs (attention implementation, mask builder, output class) when it runs:

    attention_interface(self, q, k, v, mask)      ->  attention(self_attn, q, k, v, mask)
    create_causal_mask(self.config, ...)          ->  build_mask("create_causal_mask", model, ...)
    past_key_values.update(k, v, 3)               ->  cache_call(cache, "update", k, v, 3)
    CausalLMOutputWithPast(logits=logits)         ->  model_output("..:CausalLMOutputWithPast", ..)
    Point(x, y), a named tuple or a dataclass     ->  container("..:Point", ..)
    Reverse.apply(x, 0.5)                         ->  apply_function("..:Reverse", x, 0.5)
    torch._check_tensor_all(x > 0)                ->  check(gt, "builtins:RuntimeError", None)
    h = self.scan(x), which is not followed       ->  check_result(h, "scan", float32, [None, 64])
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import masking_utils
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liger_fx.errors import ResultError
from liger_fx.kernels.compiling import inductor_compiles
from liger_fx.tracing.one_position import (
    append,
    attend_in_groups,
    attends_in_groups,
    static_layer,
)

# What a graph may do with a cache through ``cache_call``.
CACHE_METHODS = (
    "update", "update_conv_state", "update_recurrent_state", "get_conv_state",
    "get_recurrent_state", "update_indexer", "get_seq_length", "get_mask_sizes", "get_max_length",
    "get_max_cache_shape", "get_query_offset",
)  # fmt: skip


def _skips(builder: Any) -> tuple[str, ...]:
    names = inspect.signature(builder).parameters
    return tuple(name for name in names if name.startswith("allow_is_") and name.endswith("_skip"))


# transformers' mask builders by name, and the options by which each may answer None.
MASK_BUILDERS = {
    name: _skips(builder)
    for name, builder in vars(masking_utils).items()
    if name.startswith("create_") and name.endswith("_mask") and inspect.isfunction(builder)
}


def resolve(reference: str) -> Any:
    """The object named ``module:qualified.name``; AttributeError or ImportError when there is
    none."""
    # torch.compile goes through this: it can look a module up, but not import one.
    module, name = reference.split(":")
    found: Any = sys.modules.get(module)
    if found is None:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def reference_to(obj: Any) -> str:
    """The ``module:qualified.name`` under which ``resolve`` finds a class or function; LookupError
    where that leads to another, or nowhere."""
    reference = f"{obj.__module__}:{obj.__qualname__}"
    try:
        found = resolve(reference)
    except (AttributeError, ImportError):
        found = None
    if found is not obj:
        raise LookupError(f"{obj.__qualname__} of {obj.__module__} is not found by its name")
    return reference


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    default: str | None = None,
    implementation: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the implementation that ``module.config`` names at this moment.

    ``query`` (batch, heads, queries, head_dim), ``key`` and ``value`` (batch, kv_heads, keys,
    head_dim) give (batch, queries, heads, value_dim) and, for eager attention, the weights.
    ``default`` references the model's own eager function; ``implementation`` is set where the
    model does not ask its config.
    """
    config: Any = module.config
    chosen = config._attn_implementation if implementation is None else implementation
    interface = (
        resolve(default) if default and chosen == "eager" else ALL_ATTENTION_FUNCTIONS[chosen]
    )
    if attends_in_groups(interface, query, key, value, attention_mask, kwargs):
        return attend_in_groups(query, key, value, attention_mask, **kwargs)
    return interface(module, query, key, value, attention_mask, **kwargs)


def _config_of(owner: Any) -> Any:
    """The config that a module carries; a config itself, where no module below the root does."""
    return owner if isinstance(owner, PreTrainedConfig) else owner.config


def build_mask(builder: str, owner: Any, *, materialise: bool = False, **kwargs: Any) -> Any:
    """The attention mask of a builder in ``transformers.masking_utils`` for the owner's config.

    The builder may answer None (attention then works by its ``is_causal`` flag); with
    ``materialise`` it must give a tensor, because something other than attention reads it.
    """
    config = _config_of(owner)
    if not materialise and inductor_compiles() and _masks_nothing(builder, config, **kwargs):
        return None
    if materialise and builder == "create_recurrent_attention_mask":
        mask = getattr(masking_utils, builder)(config=config, **kwargs)
        return kwargs["attention_mask"] if mask is None else mask
    if materialise:
        kwargs.update(dict.fromkeys(MASK_BUILDERS[builder], False))
    return getattr(masking_utils, builder)(config=config, **kwargs)


def _masks_nothing(
    builder: str, config: Any, inputs_embeds: Any = None, input_embeds: Any = None, **kwargs: Any
) -> bool:
    """Whether PyTorch's attention, by its flag, masks all that the builder's mask would. As
    transformers answers, but not while Dynamo follows it: before PyTorch 2.14 that looks like an
    export."""
    embeds = inputs_embeds if input_embeds is None else input_embeds
    length = {
        "create_causal_mask": None,
        "create_sliding_window_causal_mask": getattr(config, "sliding_window", None),
    }
    return (
        builder in length
        and (length[builder] is None or embeds.shape[1] < length[builder])
        and not any(value is not None for value in kwargs.values())
        and config._attn_implementation == "sdpa"
        and masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is masking_utils.sdpa_mask
        and getattr(config, "is_causal", True)
    )


def new_cache(owner: Any, **changes: Any) -> DynamicCache:
    """An empty key-value cache laid out for the owner's config with these changes, or for any model
    when there is no owner."""
    if owner is None:
        return DynamicCache()
    config = _config_of(owner)
    if changes:
        config = copy.copy(config)
        for name, value in changes.items():
            setattr(config, name, value)
    return DynamicCache(config=config)


def encoder_decoder_cache(*caches: Any) -> EncoderDecoderCache:
    """A cache of a decoder's own keys and values, and one of the encoder's."""
    return EncoderDecoderCache(*caches)


def cache_call(cache: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call one of the cache's state methods, e.g. ``update(key, value, layer)``.

    ``update`` appends a layer's keys and values (batch, kv_heads, new, head_dim) and returns all
    that attention shall see.
    """
    if method == "update" and len(args) == 3 and not kwargs:
        layer = static_layer(cache, args[0], args[2])
        if layer is not None:
            return append(layer, args[0], args[1])
    return getattr(cache, method)(*args, **kwargs)


def model_output(cls: str, **fields: Any) -> Any:
    """The output class named by ``cls`` (``module:qualified.name``) with these fields."""
    return resolve(cls)(**fields)


def container(cls: str, items: Any) -> Any:
    """A tuple, list or mapping of the class named by ``cls`` with these items, or an object of a
    dataclass with these pairs of a field and its value."""
    kind = resolve(cls)
    if hasattr(kind, "__dataclass_fields__"):
        made = object.__new__(kind)
        for field, value in items:
            object.__setattr__(made, field, value)
        return made
    return kind._make(items) if hasattr(kind, "_make") else kind(items)


def apply_function(function: str, *args: Any, **kwargs: Any) -> Any:
    """What the torch.autograd.Function named by ``function`` (``module:qualified.name``) makes of
    these arguments, with the backward that its author wrote."""
    return resolve(function).apply(*args, **kwargs)


def check(condition: Any, error: str, message: str | None) -> None:
    """Raise ``error`` (``module:qualified.name``) with that message unless the condition, a bool or
    a tensor of bools, holds throughout."""
    text: Any = None if message is None else lambda: message
    if torch.compiler.is_compiling() and isinstance(condition, torch.Tensor):
        # The one form of it that a compiled graph holds.
        torch._assert_async(condition.all(), message or "a check of the model does not hold")
    elif isinstance(condition, torch.Tensor):
        torch._check_tensor_all_with(resolve(error), condition, text)
    else:
        torch._check_with(resolve(error), condition, text)


def check_result(
    tensor: torch.Tensor, module: str, dtype: torch.dtype, sizes: Sequence[int | None]
) -> None:
    """ResultError unless the tensor, a result of the module at this path, is of that dtype and of
    these sizes; None is any."""
    same = tensor.dtype is dtype and len(tensor.shape) == len(sizes)
    if not same or any(
        size is not None and size != found for size, found in zip(sizes, tensor.shape, strict=True)
    ):
        raise ResultError(
            f"{module} returned {tensor.dtype} of shape {tuple(tensor.shape)}, and "
            f"{dtype} of shape {tuple('any' if s is None else s for s in sizes)} when the model "
            f"was traced; the code around it was traced for that alone. Call the model that was "
            f"given to liger_fx.optimize, or put this code into the module."
        )


def is_output_class(kind: Any) -> bool:
    """Whether it is a mapping with named fields: transformers' ModelOutput, diffusers'
    BaseOutput."""
    return isinstance(kind, type) and issubclass(kind, dict) and dataclasses.is_dataclass(kind)
