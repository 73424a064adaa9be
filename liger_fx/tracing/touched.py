"""What modules that a graph calls, and does not go through, may change in Python while they run.

layers.0.router.aux = loss     their code writes an attribute
self.losses.append(loss)       their code names a list that is reached from elsewhere as well
 ->
    who reads it after the call is refused: a graph would hold what was there before

Found in their compiled code (reach.py) and in that of the hooks on them; nothing runs.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.contents import Look, look_at
from liger_fx.tracing.reach import Reach, reach_of, reach_of_function
from liger_fx.tracing.tree_state import hooks_of, is_capturing

_NO_STATE = (*PLAIN, torch.Tensor, type, types.FunctionType, types.ModuleType)


class Touched:
    """Attributes and objects that modules which were called so far may have changed."""

    def __init__(self) -> None:
        self._written: dict[str, set[int]] = {}
        self._objects: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._found: dict[Reach, list[Any]] = {}  # outside of modules, but for what has no state

    def add(self, called: nn.Module) -> None:
        """It was called: what its code, and that of what is inside, may change."""
        for module in called.modules():
            if id(module) not in self._seen:
                self._seen.add(id(module))
                self._add_code([module], reach_of(module))
            for hook in _hooks_on(module):
                given = [module, getattr(hook, "__self__", None)]
                self._add_code(given, [reach_of_function(hook)])

    def _add_code(self, given: list[Any], reaches: Iterable[Reach]) -> None:
        for reach in reaches:
            found = self._found.get(reach)
            if found is None:
                values = (place.value() for place in reach.places)
                found = [value for value in values if not isinstance(value, _NO_STATE)]
                self._found[reach] = found
            modules, objects = _reached([*given, *found], reach.names)
            self._objects.update(objects)
            for name in reach.stored:
                self._written.setdefault(name, set()).update(map(id, modules))

    def may_have_changed(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether the attribute of that name, ``value`` in the trace, may be another one now."""
        if id(module) in self._written.get(name, ()):
            return True
        if not self._objects or isinstance(value, (nn.Module, *_NO_STATE)):
            return False
        return not _reached([value], frozenset())[1].keys().isdisjoint(self._objects)


def _look_at(value: Any) -> Look | None:
    cls: Any = type(value)
    return look_at(cls)


def _hooks_on(module: nn.Module) -> Iterator[Any]:
    for hooks in hooks_of(module):
        yield from (hook for hook in hooks.values() if not is_capturing(hook))


def _reached(
    values: Iterable[Any], names: frozenset[str]
) -> tuple[list[nn.Module], dict[int, Any]]:
    """The modules and the mutable objects, by id, that code which has these values and names these
    attributes gets hold of."""
    modules: list[nn.Module] = []
    objects: dict[int, Any] = {}
    seen, pending = set[int](), list(values)
    for value in pending:  # grows while it is walked
        if isinstance(value, _NO_STATE) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
            held = value.__dict__
            pending += [held[name] for name in names & held.keys()]
        elif isinstance(value, tuple):
            pending += value
        elif (look := _look_at(value)) is not None:
            objects[id(value)] = value
            if look.attributes:
                pending += vars(value).values()
            if look.kind is not None:
                pending += look.kind.items(look.kind.read(value))
    return modules, objects
