"""What the code of a trace read of the world in Python: attributes of modules, and names outside
them.

self.scaling, getattr(self, "gate", None)     noted as they are read, by the module's path
TABLE["a"], rotate_half, Attention.chunk      found in the compiled code (reach.py)

A graph holds what was found there, so a call looks whether it is there still.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from liger_fx.tracing.call import PLAIN, TENSORS
from liger_fx.tracing.check import Check
from liger_fx.tracing.held import Held
from liger_fx.tracing.reach import NOTHING, Place, of_a_library, reach_of, reach_of_class
from liger_fx.tracing.tree_state import CAPTURING, class_of, groups_of, is_named
from liger_fx.tracing.walk import module_at

Names = Mapping[str, Iterable[str]]  # of attributes that were read, by the path of the module
# Modes are guarded for themselves.
_APART = frozenset(nn.Module().__dict__) | {CAPTURING}


class Attributes:
    """Attributes of the modules below a root, as they are now; ``held`` has None for one that is
    not there.

    Modules are none of them: a graph calls these as it runs. Nor are configs, whose values are
    guarded for themselves. Of tensors, which it reads as it runs, the class stays, and which of
    them are one.
    """

    def __init__(self, root: nn.Module, names: Names) -> None:
        self.held: dict[tuple[str, str], Held | None] = {}
        self.tensors: dict[tuple[str, str], type | None] = {}
        for path, own in names.items():
            module = module_at(root, path)
            if module is None or is_named(module):
                continue
            for name in own:
                value = attribute(module, name)
                if isinstance(value, torch.Tensor):
                    self.tensors[path, name] = _kind(value)
                elif not isinstance(value, (nn.Module, PreTrainedConfig)):
                    self.held[path, name] = None if value is NOTHING else Held(value)
        self._tied = _pattern(*(attribute(module_at(root, p), n) for p, n in self.tensors))

    def hold(self, root: nn.Module) -> bool:
        """Whether they are the same below this root."""
        check = Check()
        self.add_to(check, root)
        return check.compiled()()

    def add_to(self, check: Check, root: nn.Module) -> None:
        """Add that they are the same below this root."""
        self._add_tensors(check, root)
        for (path, name), held in self.held.items():
            module = module_at(root, path)
            if module is None or is_named(module):  # gone: told elsewhere
                continue
            group = _holder(module, name)
            if held is None:
                check.add("{} not in {}", name, group)
            else:
                held.add_to(check, group.get(name, NOTHING), "{}[{}]", group, name)

    def plain(self, root: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """Those that are numbers, flags and texts: the module's path, the name and the value."""
        for path, name in self.held:
            module = module_at(root, path)
            value = NOTHING if module is None else module.__dict__.get(name, NOTHING)
            if name.isidentifier() and isinstance(value, PLAIN):
                yield path, name, value

    def _add_tensors(self, check: Check, root: nn.Module) -> None:
        places: list[Any] = []
        for (path, name), kind in self.tensors.items():
            module = module_at(root, path)
            if module is None or is_named(module):
                return
            group = _holder(module, name)
            if kind is None:
                check.add("type({}[{}]) in {}", group, name, TENSORS)
            else:
                check.add("type({}[{}]) is {}", group, name, kind)
            places += [group, name]
        count = len(self.tensors)
        if count < 2:
            return
        if self._tied == tuple(range(count)):  # no two are one: told without a call for each
            ids = ", ".join(["id({}[{}])"] * count)
            check.add(f"len({{{{{ids}}}}}) == {count}", *places)
        else:
            values = ", ".join(["{}[{}]"] * count)
            check.add(f"{{}}({values}) == {{}}", _pattern, *places, self._tied)


def _kind(tensor: Any) -> Any:
    """The class of a tensor; None for any that is handled as PyTorch's own is."""
    return None if type(tensor) in TENSORS else type(tensor)


def _pattern(*values: Any) -> tuple[int, ...]:
    """Which of these values are one."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(value), i) for i, value in enumerate(values))


def attribute(module: nn.Module, name: str) -> Any:
    """What is there under that name: of the module itself, no matter what its class has."""
    return _holder(module, name).get(name, NOTHING)


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary of the module that holds the attribute; where none does, that of plain ones.
    (A parameter, buffer or child that is None is in one of PyTorch's.)"""
    groups = (module.__dict__, *groups_of(module))
    return next((group for group in groups if name in group), module.__dict__)


def names_read(module: nn.Module, name: str) -> Iterable[str]:
    """The attributes that code reads where it asks for this one."""
    if name == "__dict__":
        return module.__dict__.keys() - _APART
    return () if name in _APART or name.startswith("__") else (name,)


class Surroundings:
    """What the code of some modules, and of modules of some classes, finds outside them, and the
    forward of them all, and any method of those classes, as they are now.

    They belong to this process. Pickled they are None: what is there where that is read; but where
    they did not stand they never will.
    """

    def __init__(
        self, modules: Iterable[nn.Module], classes: Iterable[type[nn.Module]] = ()
    ) -> None:
        modules, classes = list(modules), list(classes)
        reaches = dict.fromkeys(reach for module in modules for reach in reach_of(module))
        reaches |= dict.fromkeys(map(reach_of_class, classes))
        found = [place for reach in reaches for place in reach.places]
        for cls in dict.fromkeys((*map(class_of, modules), *classes)):
            found += _places_of_method(cls, "forward")
        for cls in classes:  # what their code calls through a table of functions is not found
            own = (base for base in cls.__mro__ if not of_a_library(base.__module__))
            for name in dict.fromkeys(n for base in own for n in vars(base) if n[:2] != "__"):
                found += _places_of_method(cls, name)
        places = {place.key: place for place in found}
        self._held: list[tuple[Place, Held]] = []
        self._is_of_the_past = False
        for place in places.values():
            if not isinstance(value := place.value(), types.ModuleType):
                self._held.append((place, Held(value)))

    @functools.cached_property
    def stand(self) -> Callable[[], bool]:
        """Tells whether all of it is as it was; one function for all blocks that ask."""
        check = Check()
        if self._is_of_the_past:
            check.add("False")
        for place, held in self._held:
            held.add_to(check, place.value(), *_reading(place))
        return check.compiled()

    def add_to(self, check: Check) -> None:
        """Add that all of it is as it was."""
        check.add("{}()", self.stand)

    def __deepcopy__(self, memo: Any) -> Surroundings:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _pickled, (self.stand(),)


def _pickled(stood: bool) -> Surroundings | None:
    if stood:
        return None
    past = Surroundings(())
    past._is_of_the_past = True
    return past


def _places_of_method(cls: type[nn.Module], name: str) -> Iterator[Place]:
    """Where a class finds a method, and would before."""
    for base in cls.__mro__:
        yield Place(base, name)
        if name in vars(base):
            return


def _reading(place: Place) -> tuple[Any, ...]:
    """The expression that reads a place in the fewest steps, and its values."""
    owner, name = place
    if isinstance(owner, dict):
        return "{}[{}]", owner, name
    if isinstance(owner, types.FunctionType):
        return f"{{}}.{name}", owner
    if isinstance(owner, type):
        return "{}.get({}, {})", vars(owner), name, NOTHING
    return "{}()", place.value
