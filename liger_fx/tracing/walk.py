"""The modules of a tree by path.

``nn.Module.named_modules`` goes through a generator for each level of the tree, for each module; of
a model of many layers that is most of what it takes to look at it.
"""

from __future__ import annotations

from torch import nn


def modules_by_path(root: nn.Module, *, every_place: bool = False) -> dict[str, nn.Module]:
    """All modules from ``root`` (at "") down, as ``root.named_modules()`` has and orders them.

    every_place: a module that hangs in several places is there for each.
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
        if children:
            prefix = f"{path}." if path else ""
            below = [(prefix + name, m) for name, m in children.items() if m is not None]
            pending += reversed(below)
    return found
