"""A model for the command line: from a directory, or a tiny random one of an architecture.

    load_model("./my-model")  ->  its weights; or, with a config alone, a model without weights
    load_model("llama")       ->  a tiny random Llama

No code comes with a directory: config.json and safetensors are read, pickle and hubs are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from liger_fx.errors import UsageError, one_line
from liger_fx.tiny import LAYERS, model_class, tiny_model

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_model(
    where: str, dtype: str | None = None, layers: int | None = None, weights: bool = True
) -> tuple[PreTrainedModel, list[str]]:
    """The model in eval mode on the CPU, and what the user should know about it, as sentences.

    where: a directory with a config.json, or a transformers model type.
    dtype: float32, bfloat16 or float16; by default the checkpoint's own, else float32.
    layers: how many layers the model shall have; by default the config's, 4 for a tiny model.
    weights: where the directory has none, random ones are made; else the model stays on the meta
        device, which takes no memory.

    Raises UsageError, in one sentence, for all that is missing, corrupt or unknown.
    """
    if not where.strip():
        raise UsageError("No model was named: give a directory or a model type (llama).")
    path = Path(where)
    if path.is_dir():
        return _from_directory(path, dtype, layers, weights)
    if path.exists():
        raise UsageError(f"{where} is a file: give the directory that holds config.json.")
    if len(path.parts) > 1 or path.is_absolute():
        raise UsageError(f"There is no directory {where}.")
    model = tiny_model(where, layers or LAYERS)
    count = f"{model.num_parameters():,} parameters"
    note = f"a tiny random {type(model).__name__}: {count}, {layers or LAYERS} layers"
    return model.to(getattr(torch, dtype or "float32")), [note]


def _from_directory(
    path: Path, dtype: str | None, layers: int | None, weights: bool
) -> tuple[PreTrainedModel, list[str]]:
    config = _read_config(path)
    notes = []
    if layers:
        notes.append(f"{_set_layers(config, layers)} layers became {layers}")
    cls = _class_of(config, path)
    if any((path / name).exists() for name in _WEIGHTS):
        model, lost = _read_weights(cls, path, config, dtype)
        if lost:
            notes.append(f"the checkpoint lacks {len(lost)} weights: {lost[0]}, ... are random")
        return model, notes
    if list(path.glob("pytorch_model*.bin")):
        raise UsageError(
            f"{path} has its weights as pickle (.bin), which can run code and is not read: "
            "save them as safetensors first."
        )
    notes.append(
        f"no weights in {path}: "
        + ("they are random" if weights else "optimised from the config alone")
    )
    return _without_checkpoint(cls, config, path, dtype, weights), notes


def _read_config(path: Path) -> Any:
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path} has no config.json, so it is no model directory.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError(f"{file} names the model type {kind!r}, which transformers does not know.")
    for name, value in _implementations(raw):
        if "/" in value:
            raise UsageError(f"{file} asks for a hub's code ({name}: {value}), which is not run.")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config class may refuse its fields in any way it likes
        raise UsageError(f"{file} is no {kind} config: {one_line(error)}") from error


def _implementations(raw: Any) -> Iterator[tuple[str, str]]:
    """Every attention or experts implementation that a config names, at any depth."""
    for name, value in raw.items() if isinstance(raw, dict) else ():
        if name.endswith("_implementation"):
            yield name, str(value)
        yield from _implementations(value)


def _class_of(config: Any, path: Path) -> type[PreTrainedModel]:
    """The class that the config names, as transformers has it, else the best one for its type."""
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    return model_class(config)


def _set_layers(config: Any, layers: int) -> int:
    """Make the model `layers` deep; the depth it had."""
    text = config.get_text_config()
    had: int = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    text.num_hidden_layers = layers
    return had


def _read_weights(
    cls: type[PreTrainedModel], path: Path, config: Any, dtype: str | None
) -> tuple[PreTrainedModel, list[str]]:
    """The model with its weights, and the names of those that the checkpoint lacks."""
    try:
        model, info = cls.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the sizes
        )
    except Exception as error:  # a damaged checkpoint fails in many ways
        raise UsageError(f"The weights in {path} cannot be read: {one_line(error)}") from error
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise UsageError(
            f"The weights in {path} do not fit its config.json: {name} is "
            f"{tuple(stored)}, where the config asks for {tuple(wanted)}."
        )
    return model.eval(), sorted(info["missing_keys"])


def _without_checkpoint(
    cls: type[PreTrainedModel], config: Any, path: Path, dtype: str | None, weights: bool
) -> PreTrainedModel:
    wanted = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    try:
        with torch.device("cpu" if weights else "meta"):
            return cls._from_config(config, dtype=wanted).eval()
    except Exception as error:  # a config class may accept what its model cannot be built from
        raise UsageError(
            f"{path}/config.json gives no {cls.__name__}: {one_line(error)}"
        ) from error
