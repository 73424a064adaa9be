"""The modules of a tree by path.

``nn.Module.named_modules`` goes through a generator for each level of the tree, for each module; of
a model of many layers that is most of what it takes to look at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def modules_by_path(
    root: nn.Module,
    *,
    every_place: bool = False,
    entered: Callable[[nn.Module], bool] | None = None,
) -> dict[str, nn.Module]:
    """All modules from ``root`` (at "") down, as ``root.named_modules()`` has and orders them.

    every_place: a module that hangs in several places is there for each. entered: of a module for
    which this is false, what is below it is left out.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", root)]
    while pending:
        path, module = pending.pop()
        if not every_place:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found[path] = module
        children = module._modules
        if children and (entered is None or entered(module)):
            prefix = f"{path}." if path else ""
            below = [(prefix + name, m) for name, m in children.items() if m is not None]
            pending += reversed(below)
    return found


def module_at(root: nn.Module, path: str) -> Any:
    """The module at a path below ``root``; None where there is none."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module
