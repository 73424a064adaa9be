"""Inputs to trace and to verify a transformers model with, made from what it says of itself.

LlamaForCausalLM                  ->   input_ids, attention_mask (one row padded), labels
T5ForConditionalGeneration        ->   the same, and decoder_input_ids
LlavaForConditionalGeneration     ->   input_ids with the tokens of an image, pixel_values, ...
Wav2Vec2ForCTC                    ->   input_values
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from liger_fx.errors import UsageError
from liger_fx.media import images, names_of, parts, sounds, tokens_an_image, told
from liger_fx.tracing.call import UnsupportedCall, named_arguments
from liger_fx.tracing.leaf_modules import offloaded
from liger_fx.tracing.naming import adapted, is_transformers

Inputs = Mapping[str, Any] | tuple[Any, ...] | None
SHAPES = ((2, 7), (3, 16), (1, 33), (4, 24))  # batch, length
_BEFORE = 3  # tokens of text before an image
_WITH_LABELS = {
    name
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    for value in names.values()
    for name in ([value] if isinstance(value, str) else value)
}


def example_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments by name of the call to trace first: the user's example, or one made without
    labels.

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
    if not is_transformers(model):
        raise UsageError(
            f"{type(model).__name__} is no transformers model, so it needs example inputs: pass "
            "inputs=(tensor, ...) or inputs={'name': tensor, ...}."
        )
    made = example_inputs(model, *SHAPES[1])
    return {name: value for name, value in made.items() if name != "labels"}


def example_inputs(model: nn.Module, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one call, the same for the same seed.

    input_ids, attention_mask and labels are (batch, length) int64 on the model's device, longer
    where they hold the tokens of an image; with more than one row, the second ends in padding: mask
    0 and label -100. Images and sounds are of the sizes that the config names, in the model's
    dtype; a model of images and text whose images cannot be made is given text alone. Only what
    the model's forward takes is given. UsageError for a model that no inputs can be made for.
    """
    model = adapted(model)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(_NONE.format(type(model).__name__))
    names = names_of(type(model).forward)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    if "input_ids" in names:
        made = _text(model, batch, length, generator)
    else:
        made = images(model, batch, generator) or sounds(model, batch, length, generator)
    if "decoder_input_ids" in names:
        ids = _ids(model, batch, length, generator)
        ids[:, 0] = told(model.config, "decoder_start_token_id", "bos_token_id") or 0
        made |= {"decoder_input_ids": ids, "labels": ids.roll(-1, 1)}
    return _fitting(model, made)


def _fitting(model: PreTrainedModel, made: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of what was made, what this model takes, on its device and in its dtype."""
    names, kind = names_of(type(model).forward), type(model).__name__
    required = [
        name
        for name, p in names.items()
        if name != "self" and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if not made or any(name not in made for name in required):
        raise UsageError(_NONE.format(kind))
    kept = {n: t for n, t in made.items() if n in names}
    if kind not in _WITH_LABELS:
        kept.pop("labels", None)
    first, device = _first_weight(model), _device(model)
    return {
        name: tensor.to(device, first.dtype if tensor.is_floating_point() else None)
        for name, tensor in kept.items()
    }


def _first_weight(model: PreTrainedModel) -> torch.Tensor:
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _device(model: PreTrainedModel) -> torch.device:
    """Where the model computes: its weights may be elsewhere until they are used."""
    device = _first_weight(model).device
    if device.type != "meta":
        return device
    return next((place for *_, place in offloaded(model.modules())), device)


_NONE = "No inputs can be made for a {}: pass inputs={{'name': tensor, ...}}."


def _text(
    model: PreTrainedModel, batch: int, length: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Token ids and what goes with them: mask, labels, an image for each row."""
    ids = _ids(model, batch, length, generator)
    seen: dict[str, torch.Tensor] = {}
    token = told(model.config, "image_token_id", "image_token_index")
    pictures = images(model, batch, generator)
    on_model = {name: value.to(_device(model)) for name, value in pictures.items()}
    if token is None:
        seen = pictures
    elif pictures and (count := tokens_an_image(model, on_model, batch)) is not None:
        seen = pictures
        ids = _with_image(model, ids, token, count)
    mask = torch.ones_like(ids)
    mask[1:2, ids.shape[1] - length // 3 :] = 0
    made = {"input_ids": ids, "attention_mask": mask, **seen}
    is_image = ids == token if token is not None else torch.zeros_like(ids, dtype=torch.bool)
    if token is not None:
        made["token_type_ids"] = made["mm_token_type_ids"] = is_image.long()
    return made | {"labels": ids.masked_fill((mask == 0) | is_image, -100)}


def _with_image(model: PreTrainedModel, ids: torch.Tensor, token: int, count: int) -> torch.Tensor:
    """The ids, and an image among them, between the tokens that begin and end one, if any do."""
    begin = told(model.config, "vision_start_token_id", "boi_token_index", "boi_token_id")
    end = told(model.config, "vision_end_token_id", "eoi_token_index", "eoi_token_id")
    marks = [[] if mark is None else [mark] for mark in (begin, end)]
    middle = [*marks[0], *[token] * count, *marks[1]]
    image = torch.tensor(middle).expand(ids.shape[0], -1)
    return torch.cat((ids[:, :_BEFORE], image, ids[:, _BEFORE:]), dim=1)


def _ids(model: Any, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random token ids, none of them one that the config gives a meaning of its own."""
    size = _vocabulary(model)
    ids = torch.randint(3, size, (batch, length), generator=generator)
    special = {
        value
        for part in parts(model.config)
        for name, value in vars(part).items()
        if name.endswith(("_token_id", "_token_index")) and type(value) is int
    }
    plain = next((i for i in range(3, size) if i not in special), 0)
    for value in special:
        ids[ids == value] = plain
    return ids


def _vocabulary(model: Any) -> int:
    """How many tokens the model knows."""
    size: int | None = told(model.config, "decoder_vocab_size")
    if size is None:
        try:
            size = model.get_input_embeddings().weight.shape[0]
        except (AttributeError, NotImplementedError):
            size = told(model.config, "vocab_size")
    if size is None:
        raise UsageError(_NONE.format(type(model).__name__))
    return size


def further_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What else a language model's forward may take for these ids, (batch, length) int64 each but
    for inputs_embeds, which are (batch, length, width) and the ids' own."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    found = {"position_ids": places, "token_type_ids": torch.zeros_like(ids)}
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # CLIP has two
        return found
    with torch.no_grad():
        return {"inputs_embeds": embedding(ids), **found}
