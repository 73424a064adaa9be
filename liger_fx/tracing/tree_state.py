"""What a graph assumes of the module tree it runs in, compared at every call in a few microseconds.

model.eval(); model.model.layers[0].train()    ->  one mode differs: another graph must serve
model.to(torch.bfloat16)                       ->  the dtypes differ
model.config.output_attentions = True          ->  the config differs
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

# Looked up when the graph runs, so it may change.
_ATTENTION = ("_attn_implementation_internal", "_attn_implementation")


class TreeState:
    """Modes, hooks, dtypes, devices and configs of a module tree, compared in a few
    microseconds."""

    def __init__(
        self, root: nn.Module, modules: list[nn.Module], training: bool, attention_fixed: bool
    ) -> None:
        self.training = training
        self.modes = [
            m.__dict__ for m in modules if m is root or _code_mentions(type(m), "training")
        ]
        self.hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.checkpointing = [m.__dict__ for m in modules if hasattr(m, "gradient_checkpointing")]
        self.tensors = _telling_tensors(root, modules)
        self.dtypes = list(map(_dtype, self.tensors))
        self.devices = list(map(_device, self.tensors))
        unguarded = () if attention_fixed else _ATTENTION
        self.configs = [_ConfigState(config, unguarded) for config in _configs(modules)]

    def holds(self) -> bool:
        training = self.training
        for mode in self.modes:
            if mode["training"] is not training:
                return False
        if any(self.hooks) and not all(is_capturing(h) for hs in self.hooks for h in hs.values()):
            return False
        if training:
            for attributes in self.checkpointing:
                if attributes.get("gradient_checkpointing"):
                    return False
        if list(map(_dtype, self.tensors)) != self.dtypes:
            return False
        if list(map(_device, self.tensors)) != self.devices:
            return False
        return all(config.holds() for config in self.configs)


_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")


def _telling_tensors(root: nn.Module, modules: list[nn.Module]) -> list[torch.Tensor]:
    """Parameters whose dtype decides what the graph's frozen casts mean.

    Those that modules of the graph hold themselves, and embeddings, up to a handful of each class:
    a model changes dtype as a whole or by kind of module, and a deep one must not pay for every
    layer.
    """
    counts: dict[tuple[type, str], int] = {}
    found: dict[int, torch.Tensor] = {}
    for module in root.modules():
        if isinstance(module, nn.Linear):
            continue  # a linear layer of another dtype than its input raises by itself
        for name, tensor in module._parameters.items():
            key = (type(module), name)
            counts[key] = counts.get(key, 0) + 1
            if tensor is not None and counts[key] <= 8:
                found.setdefault(id(tensor), tensor)
    first = next(root.parameters(), None)
    if first is not None:
        found.setdefault(id(first), first)
    return list(found.values())


class _ConfigState:
    """A config's values as they were, but for those named in ``unguarded``."""

    def __init__(self, config: Any, unguarded: tuple[str, ...]) -> None:
        self.now, self.unguarded = vars(config), unguarded
        # Nested configs are guarded on their own, and are compared here by identity.
        self.then = {
            name: value if list(_configs_in(value)) else copy.deepcopy(value)
            for name, value in self.now.items()
        }

    def holds(self) -> bool:
        if self.now == self.then:
            return True
        missing = object()
        return all(
            self.now.get(name, missing) == self.then.get(name, missing)
            for name in self.now.keys() | self.then.keys()
            if name not in self.unguarded
        )


def _configs(modules: list[nn.Module]) -> list[Any]:
    """The configs of these modules and all configs nested in them, once each."""
    found: dict[int, Any] = {}
    pending = [getattr(m, "config", None) for m in modules]
    while pending:
        config = pending.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending += [c for value in vars(config).values() for c in _configs_in(value)]
    return list(found.values())


def _configs_in(value: Any) -> Iterator[Any]:
    if isinstance(value, PreTrainedConfig):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _configs_in(item)


def is_capturing(hook: Any) -> bool:
    """Whether it is transformers' own hook for output_hidden_states, idle unless asked for."""
    return "output_capturing_hook" in getattr(hook, "__qualname__", "")


def _code_mentions(cls: type, name: str) -> bool:
    """Whether a method of the class (PyTorch's own aside) uses an attribute of that name."""
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            continue
        for value in vars(base).values():
            code = getattr(getattr(value, "__wrapped__", value), "__code__", None)
            if code is not None and name in code.co_names:
                return True
    return False
