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
from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.reach import (
    Reach,
    reach_of_attributes,
    reach_of_class,
    reach_of_function,
)
from liger_fx.tracing.tree_state import hooks_of, is_capturing
from liger_fx.tracing.walk import modules_by_path

_NO_STATE = (*PLAIN, torch.Tensor, type, types.FunctionType, types.ModuleType)


class Touched:
    """Attributes and objects that modules which were called so far may have changed."""

    def __init__(self) -> None:
        self._written: dict[str, set[int]] = {}
        self._objects: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._found: dict[Reach, list[Any]] = {}  # outside of modules, but for what has no state
        self._of_class: dict[type, Reach] = {}
        self._harmless: dict[int, Any] = {}

    def add(self, called: nn.Module, like: Any = None) -> bool:
        """It was called: what its code, and that of what is inside, may change. Those that are
        called alike, ``like`` the same object, are made alike: of many layers the first tells
        whether there is anything to find. Whether it has no hooks and may change nothing."""
        if id(like) in self._harmless and not any(_hooks_on(called)):
            return True
        is_harmless = self._add(called)
        if is_harmless and like is not None:
            self._harmless[id(like)] = like
        return is_harmless

    def _add(self, called: nn.Module) -> bool:
        known = len(self._objects), sum(map(len, self._written.values()))
        is_hooked = False

        def is_own(module: nn.Module) -> bool:
            return module is called or not is_block(module)

        for module in modules_by_path(called, entered=is_own).values():
            if not is_own(module):
                is_hooked |= not self.add(module, like=module.kin)
                continue
            if id(module) not in self._seen:
                self._seen.add(id(module))
                kind = type(module)
                if kind not in self._of_class:  # of many modules there are few classes
                    self._of_class[kind] = reach_of_class(kind)
                self._add_code([module], [self._of_class[kind], *reach_of_attributes(module)])
            for hook in _hooks_on(module):
                is_hooked = True
                given = [module, getattr(hook, "__self__", None)]
                self._add_code(given, [reach_of_function(hook)])
        now = len(self._objects), sum(map(len, self._written.values()))
        return now == known and not is_hooked

    def _add_code(self, given: list[Any], reaches: Iterable[Reach]) -> None:
        for reach in reaches:
            if not (reach.names or reach.places):  # a library's code
                continue
            found = self._found.get(reach)
            if found is None:
                values = (place.value() for place in reach.places)
                found = [value for value in values if _has_state(value)]
                self._found[reach] = found
            modules, objects = _reached([*given, *found], reach.names)
            self._objects.update(objects)
            for name in reach.stored:
                self._written.setdefault(name, set()).update(map(id, modules))

    def may_have_changed(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether the attribute of that name, ``value`` in the trace, may be another one now."""
        if id(module) in self._written.get(name, ()):
            return True
        if not self._objects or isinstance(value, nn.Module) or not _has_state(value):
            return False
        return not _reached([value], frozenset())[1].keys().isdisjoint(self._objects)


def _has_state(value: Any) -> bool:
    """By its type: a trace sees all that is asked of a module, its class too, and that takes
    time."""
    return not issubclass(type(value), _NO_STATE)


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
    seen, pending = set[int](), list(filter(_has_state, values))
    for value in pending:  # grows while it is walked
        if id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(type(value), nn.Module):
            modules.append(value)
            held = value.__dict__
            pending += [v for name in names & held.keys() if _has_state(v := held[name])]
        elif isinstance(value, tuple):
            pending += filter(_has_state, value)
        elif (look := _look_at(value)) is not None:
            objects[id(value)] = value
            if look.attributes:
                pending += filter(_has_state, vars(value).values())
            if look.kind is not None:
                pending += filter(_has_state, look.kind.items(look.kind.read(value)))
    return modules, objects
