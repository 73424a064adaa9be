"""What a graph assumes of the module tree it runs in, compared at every call in a few microseconds.

model.eval(); model.model.layers[0].train()    ->  one mode differs: another graph must serve
model.to(torch.bfloat16)                       ->  the dtypes differ
model.config.output_attentions = True          ->  the config differs
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
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
        # PyTorch numbers all hooks of the process: while the number stands, no new one does.
        self.hooks_seen = -1
        self.checkpointing = [m.__dict__ for m in modules if hasattr(m, "gradient_checkpointing")]
        self.tensors = _telling_tensors(root)
        self.kinds = self._kinds()
        unguarded = () if attention_fixed else _ATTENTION
        self.configs = [_ConfigState(config, unguarded) for config in _configs(modules)]

    def holds(self) -> bool:
        training = self.training
        if list(map(_mode, self.modes)).count(training) != len(self.modes):
            return False
        if RemovableHandle.next_id != self.hooks_seen and not self._no_hooks():
            return False
        if training:
            for attributes in self.checkpointing:
                if attributes.get("gradient_checkpointing"):
                    return False
        if self._kinds() != self.kinds:
            return False
        return all(config.holds() for config in self.configs)

    def _kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        # Looked up by name: a parameter may have been replaced since.
        return [((t := group[name]).dtype, t.device) for group, name in self.tensors]

    def _no_hooks(self) -> bool:
        number = RemovableHandle.next_id
        if all(is_capturing(hook) for hooks in self.hooks for hook in hooks.values()):
            self.hooks_seen = number
            return True
        return False


_mode = operator.itemgetter("training")


def _telling_tensors(root: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Parameters whose dtype decides what the graph's frozen casts mean, as (group, name).

    All but those of linear layers, which raise by themselves at an input of another dtype; up to a
    handful of each class: a model changes dtype as a whole or by kind of module, and a deep one
    must not pay for every layer.
    """
    counts: Counter[tuple[type, str]] = Counter()
    found: list[tuple[dict[str, Any], str]] = []
    for module in root.modules():
        for name, tensor in module._parameters.items():
            kind = (type(module), name)
            counts[kind] += 1
            most = 1 if isinstance(module, nn.Linear) else 8
            if tensor is not None and counts[kind] <= most:
                found.append((module._parameters, name))
    return found


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
