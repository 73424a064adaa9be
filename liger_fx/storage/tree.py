"""What a saved graph keeps of a module tree, to know the tree again: modules and tensors.

model.layers.0.mlp.gate_proj   Linear(in_features=56, ...)   ->   its class and a digest
model.embed_tokens.weight, lm_head.weight, one tensor        ->   one record, and "same_as"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedConfig

from liger_fx.graph_model import GraphModel
from liger_fx.storage.named_modules import is_named

_INTERNALS = frozenset(nn.Module().__dict__)
# Set while a model is used, or where it was read from: no part of what it computes.
_PASSING = {
    "gradient_checkpointing", "_gradient_checkpointing_func", "name_or_path", "_is_hf_initialized",
}  # fmt: skip
# What torch.fx keeps on an optimised model's root.
_GRAPH_MODULE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))

PARAMETER, BUFFER, CONSTANT, ATTRIBUTE = "parameter", "buffer", "constant", "attribute"
# In a checkpoint are parameters and persistent buffers, the rest belongs to the model's code.
IN_CHECKPOINT = (PARAMETER, BUFFER)


@dataclass(frozen=True)
class Slot:
    """A place of the tree where a tensor is: ``group[name]``, where ``path`` leads."""

    path: str
    kind: str
    group: dict[str, Any]
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        found: torch.Tensor = self.group[self.name]
        return found


def slots(root: nn.Module) -> Iterator[Slot]:
    """Every place of a tensor, tied ones each: parameters, buffers, tensors that are attributes."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        passing = module._non_persistent_buffers_set
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield Slot(prefix + name, PARAMETER, module._parameters, name)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = CONSTANT if name in passing else BUFFER
                yield Slot(prefix + name, kind, module._buffers, name)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield Slot(prefix + name, ATTRIBUTE, vars(module), name)


def digests(root: nn.Module) -> list[list[str]]:
    """[path, class name, digest] of each module that is not a named one.

    The digest tells two modules apart that differ in their class, their config or a plain
    attribute: an eps, a scale, an activation function.
    """
    configs: dict[int, str] = {}
    return [
        [path, class_of(module).__name__, _digest(module, configs)]
        for path, module in root.named_modules()
        if not is_named(module)
    ]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; of an optimised model, the class of the model it was made from."""
    return getattr(module, "model_class", type(module))


def _digest(module: nn.Module, configs: dict[int, str]) -> str:
    cls = class_of(module)
    plain = {name: _fact(value, configs) for name, value in _attributes(module).items()}
    text = repr((cls.__module__, cls.__qualname__, sorted(plain.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _attributes(module: nn.Module) -> dict[str, Any]:
    skipped = _INTERNALS | _PASSING | _GRAPH_MODULE
    held = module._attributes() if isinstance(module, GraphModel) else vars(module)
    return {
        name: value
        for name, value in held.items()
        if name not in skipped and not isinstance(value, (torch.Tensor, nn.Module))
    }


def config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that a model computes by."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        found.pop(name, None)
    return {**found, "experts": getattr(config, "_experts_implementation", None)}


def _fact(value: Any, configs: dict[int, str]) -> str:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, PreTrainedConfig):
        if id(value) not in configs:
            configs[id(value)] = repr(sorted(config_facts(value).items()))
        return configs[id(value)]
    if isinstance(value, (list, tuple)):
        return f"list({', '.join(_fact(item, configs) for item in value)})"
    if isinstance(value, dict):
        items = sorted(f"{key!r}: {_fact(item, configs)}" for key, item in value.items())
        return f"dict({', '.join(items)})"
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    return type(value).__qualname__
