"""A second tree of the same modules around the same weights: the given model stays as it is.

    LlamaForCausalLM(model, lm_head)
 ->
    LlamaForCausalLM'(model', lm_head')   with   lm_head'.weight is lm_head.weight

Classes, names, parameters and buffers are the same objects; containers, hooks, modes and configs
are not.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_tree(model: M) -> M:
    """A copy of every module of ``model``, sharing its parameters and buffers; no memory for
    weights."""
    copies = {module: _bare_copy(module) for module in model.modules()}
    configs: dict[int, Any] = {}
    for module, twin in copies.items():
        attributes = twin.__dict__
        for name, value in module.__dict__.items():
            attributes[name] = _copied(name, value, copies, configs)
    return copies[model]  # type: ignore[return-value]


def _bare_copy(module: nn.Module) -> nn.Module:
    return module.__class__.__new__(module.__class__)


def _copied(
    name: str, value: Any, copies: dict[nn.Module, nn.Module], configs: dict[int, Any]
) -> Any:
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    if name == "config" or name.endswith("_config"):
        # One copy for all modules that shared the config: what is set on one copy, all of them see.
        return configs.setdefault(id(value), copy.deepcopy(value))
    kind = type(value)
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            if isinstance(item, nn.Module):
                twin[key] = copies.get(item, item)
        return twin
    if kind in (list, tuple, set):
        return kind(
            copies.get(item, item) if isinstance(item, nn.Module) else item for item in value
        )
    return value
