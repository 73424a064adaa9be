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
    known: dict[int, Any] = {id(module): twin for module, twin in copies.items()}
    for module, twin in copies.items():
        attributes = twin.__dict__
        for name, value in module.__dict__.items():
            if name == "config" or name.endswith("_config"):
                # One copy for all modules that shared the config: what is set on one copy, all of
                # them see.
                attributes[name] = known.setdefault(id(value), copy.deepcopy(value))
            else:
                attributes[name] = _copied(value, known)
    return copies[model]  # type: ignore[return-value]


def _bare_copy(module: nn.Module) -> nn.Module:
    return module.__class__.__new__(module.__class__)


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """The copy of a module or container, down to the containers in it; anything else as it is."""
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    if isinstance(value, dict):
        twin = known[id(value)] = copy.copy(value)
        for key, item in value.items():
            twin[key] = _copied(item, known)
        return twin
    if kind is list:
        items: list[Any] = []
        known[id(value)] = items
        items += (_copied(item, known) for item in value)
        return items
    if kind in (tuple, set):
        twin = kind(_copied(item, known) for item in value)
        return twin
    return value
