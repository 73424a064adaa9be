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

from liger_fx.tracing.call import CallSpec, Namer, UnsupportedCall, is_mask

# The sizes that transformers models share between inputs, by the inputs' names.
_TRANSFORMERS_SIZES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "labels": ("batch", "sequence"),
    "inputs_embeds": ("batch", "sequence", ""),
}


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers model, with a config that says how to call it."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def describe_call(block: nn.Module, arguments: Mapping[str, Any], *, inner: bool) -> CallSpec:
    """The kind of call that these named arguments make of the block; UnsupportedCall where no graph
    can serve it.

    inner: whether it is a block inside a model, which is handed hidden states.
    """
    if is_transformers(block) and "is_causal" in arguments:
        raise UnsupportedCall("is_causal, which rewrites the config while the call lasts")
    hidden = _first_hidden(arguments) if inner else None
    return _Names(is_transformers(block), hidden).describe(arguments)


def _first_hidden(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    return None


class _Names(Namer):
    """Names by what the inputs are called; a size whose name alone says nothing gets a hint."""

    def __init__(self, is_transformers: bool, hidden: torch.Tensor | None) -> None:
        super().__init__()
        self.is_transformers, self.hidden = is_transformers, hidden

    def sizes(self, name: str, tensor: torch.Tensor) -> tuple[int | str, ...]:
        known = _TRANSFORMERS_SIZES.get(name, ()) if self.is_transformers else ()
        if tensor is self.hidden:
            known = ("batch", "sequence", "")
        known = known if len(known) == tensor.ndim else ()
        return tuple(
            self._size(name, dim, int(size), known, tensor) for dim, size in enumerate(tensor.shape)
        )

    def _size(
        self, name: str, dim: int, size: int, known: tuple[str, ...], tensor: torch.Tensor
    ) -> int | str:
        # A size of one may be a broadcast one (position_ids of all rows), so it is taken as it is,
        # except where the name of the input says what it is.
        if known:
            fixed = not known[dim] or (size == 1 and name == "position_ids")
            return size if fixed else known[dim]
        if size == 1:
            return 1
        shared = dim == 0 or (dim == 1 and tensor.ndim < 4)
        if self.hidden is not None and shared and size == self.hidden.shape[dim]:
            return ("batch", "sequence")[dim]
        named = f"{name}_{dim}"
        self.hints[named] = size
        if is_mask(tensor) and dim > 1:
            self.loose.add(named)
        return named
