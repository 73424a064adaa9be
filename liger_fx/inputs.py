"""Inputs to verify a language model with, made from what the model says of itself.

LlamaForCausalLM   ->   input_ids, attention_mask (one row padded on the right), labels
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from liger_fx.errors import UsageError
from liger_fx.tracing.call import UnsupportedCall, named_arguments

Inputs = Mapping[str, Any] | tuple[Any, ...] | None
SHAPES = ((2, 7), (3, 16), (1, 33), (4, 24))  # batch, length
_WITH_LABELS = {
    name
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    for value in names.values()
    for name in ([value] if isinstance(value, str) else value)
}


def example_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments by name of the call to trace first: the user's example, or ids and a mask.

    UsageError for what is no example, and for a model that needs one.
    """
    forward = type(model).forward
    try:
        if isinstance(inputs, Mapping):
            return named_arguments(forward, (), inputs)
        if isinstance(inputs, (tuple, list)):
            return named_arguments(forward, tuple(inputs), {})
    except UnsupportedCall as unsupported:
        raise UsageError(f"The example inputs hold {unsupported}.") from None
    if inputs is not None:
        raise UsageError(
            "Example inputs are a tuple of positional arguments or a mapping of named ones, not "
            f"a {type(inputs).__name__}."
        )
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is no transformers model, so it needs example inputs: pass "
            "inputs=(tensor, ...) or inputs={'name': tensor, ...}."
        )
    names = inspect.signature(forward).parameters
    if "input_ids" not in names:
        raise UsageError(
            f"{type(model).__name__} takes no input_ids; pass example inputs as "
            "inputs={'name': tensor, ...}."
        )
    made = example_inputs(model, *SHAPES[1])
    return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}


def example_inputs(model: nn.Module, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one call, the same for the same seed.

    input_ids, attention_mask and labels are (batch, length) int64 on the model's device; where
    there is more than one row, the second ends in padding: mask 0 and label -100. Only what the
    model's forward takes is given. Raises UsageError for a model that takes no input_ids.
    """
    names = inspect.signature(type(model).forward).parameters
    if not isinstance(model, PreTrainedModel) or "input_ids" not in names:
        raise UsageError(
            f"No inputs can be made for a {type(model).__name__}: "
            "pass inputs={'name': tensor, ...}."
        )
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, embeddings.weight.shape[0], (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, length - length // 3 :] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__ in _WITH_LABELS:
        made["labels"] = ids.masked_fill(mask == 0, -100)
    device = embeddings.weight.device
    return {name: tensor.to(device) for name, tensor in made.items() if name in names}


def further_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What else a language model's forward may take for these ids, (batch, length) int64 each but
    for inputs_embeds, which are (batch, length, width) and the ids' own."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    return {
        "inputs_embeds": embedded,
        "position_ids": places,
        "token_type_ids": torch.zeros_like(ids),
    }
