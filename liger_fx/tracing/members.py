"""The modules and tensors of a traced tree, by what a trace meets of them.

A block's code calls the blocks inside it and rarely looks into them; in a deep model nearly all
modules are there. So these are looked at when something of them turns up, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.walk import modules_by_path

_NO_TENSORS = frozenset(map(type, ({}, [], set(), (), None, True, 0, 0.0, "")))


class Members:
    """Paths of the modules and tensors of ``root``.

    entered: the modules whose code a trace may run, and the blocks that it calls, by path: all, if
        it goes through the blocks ``inside``.
    """

    def __init__(self, root: nn.Module, *, inside: bool) -> None:
        self.root = root
        self.entered = modules_by_path(root) if inside else entered_modules(root)
        self.paths = {module: path for path, module in self.entered.items()}
        self._tensors = _named_tensors(self.entered)
        self._has_all = inside

    def path_of(self, module: nn.Module) -> str | None:
        """Where the module hangs, None if it is none of the tree."""
        return self._found(lambda: self.paths.get(module))

    def path_of_tensor(self, tensor: torch.Tensor) -> str | None:
        """The path of a parameter, a buffer or a tensor held as a plain attribute, None if it is
        none of the tree."""
        return self._found(lambda: self._tensors.get(id(tensor)))

    def owner_of_config(self, config: Any) -> str | None:
        """The outermost module below the root that carries this very config."""
        return self._found(lambda: _outermost_with(config, self.paths))

    def name_tensor(self, tensor: torch.Tensor, path: str) -> None:
        """Give a tensor that is none of the tree a path."""
        self._tensors[id(tensor)] = path

    def _found(self, look: Callable[[], str | None]) -> str | None:
        """What is found among what is entered, or else inside the blocks as well."""
        path = look()
        if path is None and not self._has_all:
            self._look_inside()
            path = look()
        return path

    def _look_inside(self) -> None:
        self._has_all = True
        everything = modules_by_path(self.root)
        self.paths = {module: path for path, module in everything.items()}
        self._tensors = {**_named_tensors(everything), **self._tensors}


def entered_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The modules whose code a trace of ``root`` may run, and the blocks that it calls, by path."""

    def enters(module: nn.Module) -> bool:
        return module is root or not is_block(module) or isinstance(module, PreTrainedModel)

    return modules_by_path(root, entered=enters)


def _named_tensors(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    named: dict[int, str] = {}
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for group in (module._parameters, module._buffers, module.__dict__):
            for name, value in group.items():
                # Asking a class that is known first: most values are PyTorch's own dictionaries.
                if type(value) not in _NO_TENSORS and isinstance(value, torch.Tensor):
                    named.setdefault(id(value), prefix + name)
    return named


def _outermost_with(config: Any, paths: Mapping[nn.Module, str]) -> str | None:
    owners = [
        (path.count("."), path)
        for module, path in paths.items()
        if path and module.__dict__.get("config") is config
    ]
    return min(owners)[1] if owners else None
