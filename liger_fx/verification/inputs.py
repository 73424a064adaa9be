"""Inputs to verify a language model with, made from what the model says of itself.

LlamaForCausalLM   ->   input_ids, attention_mask (one row padded on the right), labels
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from liger_fx.errors import UsageError

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
