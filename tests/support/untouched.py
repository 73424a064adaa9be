"""Promise 1: nothing of transformers, of torch or of the given model is altered.

    before = Untouched(model)
    optimize(model)
    assert before.changes() == []

A snapshot keeps the objects themselves and compares by identity, so that a patched function shows
even when it was wrapped to look the same. Names added later (lazy imports, caches) are no change.
"""

from __future__ import annotations

import builtins
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint

PATCHABLE = (
    torch,
    torch.nn.functional,
    torch.amp.autocast_mode,
    torch.autograd.grad_mode,
    torch.fx,
    torch.fx._symbolic_trace,
    torch.utils.checkpoint,
    torch.Tensor,
    torch.nn.Module,
    torch.nn.Parameter,
    torch.autocast,
    torch.set_grad_enabled,
    torch.no_grad,
    torch.enable_grad,
    torch.autograd.Function,
    builtins,
    math,
)


def _namespaces() -> Iterator[tuple[str, Any]]:
    for owner in PATCHABLE:
        yield getattr(owner, "__qualname__", owner.__name__), owner
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "transformers" or not isinstance(module, types.ModuleType):
            continue
        yield name, module
        for attribute, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == name:
                yield f"{name}.{attribute}", value


def _world() -> dict[tuple[str, str], Any]:
    found = {}
    for name, owner in _namespaces():
        for attribute, value in list(vars(owner).items()):
            if callable(value) or isinstance(value, property | classmethod | staticmethod | type):
                found[name, attribute] = value
    return found


def _anatomy(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """What a model can be changed in: classes, attributes, hooks, mode, tensors and their data."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        found[path, "class"] = type(module)
        found[path, "attributes"] = {
            name: id(value) for name, value in vars(module).items() if not isinstance(value, dict)
        }
        found[path, "hooks"] = [
            (name, list(value)) for name, value in vars(module).items() if name.endswith("_hooks")
        ]
        found[path, "children"] = {name: id(child) for name, child in module._modules.items()}
    config = getattr(model, "config", None)
    if config is not None:
        found["", "config"] = (str(config.to_dict()), config._attn_implementation)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # _version counts in-place writes, which data_ptr and the values at the end may not show
        state = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad)
        found[path, "tensor"] = (*state, id(tensor.grad), tensor.device, tensor.dtype)
    return found


class Untouched:
    """A snapshot of the process and, when given, of a model."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model
        self.world = _world()
        self.anatomy = _anatomy(model) if model is not None else {}
        self.modes = self._modes()

    def changes(self) -> list[str]:
        """What is not as it was, as readable names; empty when nothing changed."""
        world = _world()
        changed = [".".join(key) for key, was in self.world.items() if world.get(key) is not was]
        anatomy = _anatomy(self.model) if self.model is not None else {}
        changed += [
            f"{path or 'the model'}: {what}"
            for path, what in sorted(self.anatomy.keys() | anatomy.keys())
            if self.anatomy.get((path, what)) != anatomy.get((path, what))
        ]
        modes = self._modes()
        return changed + [name for name, value in self.modes.items() if modes[name] != value]

    @staticmethod
    def _modes() -> dict[str, Any]:
        return {
            "grad mode": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "autocast dtype": torch.get_autocast_dtype("cpu"),
            "default dtype": torch.get_default_dtype(),
            "function modes": torch._C._len_torch_function_stack(),
            "dispatch modes": torch._C._len_torch_dispatch_stack(),
        }
