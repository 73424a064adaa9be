"""What the code of a class can touch outside the modules: names of its files, closures, class
attributes, and the same of the functions that it calls.

    def forward(self, x):            ->   the counter and the table of this file,
        counter["n"] += 1                 what rotate() touches
        return rotate(x, table(8))

Found in the compiled code, once a class; nothing runs.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from liger_fx.tracing.held import original

_MOST_FUNCTIONS = 2000
_OF_A_FUNCTION = ("__dict__", "__defaults__", "__kwdefaults__", "__code__")
_CACHED = functools._lru_cache_wrapper
# What is called there keeps no state of a model's.
_LIBRARIES = frozenset({"torch", "numpy", "triton", "liger_fx", "einops", *sys.stdlib_module_names})
NOTHING = object()


class Place(NamedTuple):
    """Where code finds a value: in globals or attributes (a dictionary), in a cell, in a class, at
    a function."""

    owner: Any
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from others as long as its owner lives."""
        return id(self.owner), self.name

    def value(self) -> Any:
        """What is there now; NOTHING where nothing is."""
        owner = self.owner
        if isinstance(owner, types.CellType):
            return _in_cell(owner)
        if isinstance(owner, types.FunctionType):
            return getattr(owner, self.name)
        return (owner if isinstance(owner, dict) else vars(owner)).get(self.name, NOTHING)

    def put(self, value: Any) -> None:
        """Let it be there."""
        owner = self.owner
        if isinstance(owner, types.CellType):
            if value is NOTHING:
                del owner.cell_contents
            else:
                owner.cell_contents = value
        elif isinstance(owner, dict):
            if value is NOTHING:
                owner.pop(self.name, None)
            else:
                owner[self.name] = value
        elif value is NOTHING:
            delattr(owner, self.name)
        else:
            setattr(owner, self.name, value)


@dataclass(frozen=True, eq=False)
class Reach:
    """places: where code finds values. caches: of these, functions with a cache. names: all that
    the code names; stored: of these, the attributes that it may write. functions: the places of
    what was walked through, and that; code: the functions among it."""

    places: tuple[Place, ...]
    caches: tuple[Place, ...]
    names: frozenset[str]
    stored: frozenset[str]
    functions: tuple[tuple[Place, Any], ...]
    code: tuple[types.FunctionType, ...]

    @property
    def stands(self) -> bool:
        """Whether the code is that still."""
        return all(original(place.value()) is then for place, then in self.functions)


def is_cached(value: Any) -> bool:
    """Whether it is a function with a cache of functools around it."""
    return isinstance(_unbound(value), _CACHED)


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return NOTHING


def reach_of(module: nn.Module) -> Iterator[Reach]:
    """What the code of a module can touch: its class's forward, functions among its attributes."""
    yield reach_of_class(type(module))
    yield from reach_of_attributes(module)


def reach_of_class(cls: type[nn.Module]) -> Reach:
    """What the forward of a class of modules can touch."""
    return _of_code(cls)


def reach_of_attributes(module: nn.Module) -> Iterator[Reach]:
    """What the functions among the attributes of a module can touch."""
    for value in module.__dict__.values():
        if type(value) in _FUNCTIONS:
            yield _of_code(value)


def reach_of_function(function: Any) -> Reach:
    """What a function, a method or another callable object can touch."""
    function = _unbound(function)
    return _of_code(function if type(function) in _FUNCTIONS else _unbound(type(function).__call__))


def _of_code(code: Any) -> Reach:
    found = _REACH.get(code)
    if found is None or not found.stands:
        walk = _Walk(code)
        caches = tuple(place for place in walk.places if is_cached(place.value()))
        functions = tuple((p, original(v)) for p in walk.places if _is_code(v := p.value()))
        found = Reach(
            tuple(walk.places),
            caches,
            frozenset(walk.names),
            frozenset(walk.stored),
            functions,
            tuple(walk.functions),
        )
        _REACH[code] = found
    return found


def _is_code(value: Any) -> bool:
    kinds = (types.FunctionType, types.CodeType, functools.partial, property, classmethod)
    return isinstance(value, (*kinds, staticmethod, _CACHED))


_FUNCTIONS = (types.FunctionType, functools.partial, _CACHED)
_REACH: weakref.WeakKeyDictionary[Any, Reach] = weakref.WeakKeyDictionary()


class _Walk:
    """One walk from a class's forward, or from a function, through what it names."""

    def __init__(self, code: Any) -> None:
        self.places: list[Place] = []
        self._by_id: set[tuple[int, str]] = set()
        self._seen: set[int] = set()
        self.functions: list[types.FunctionType] = []
        self.names: set[str] = set()
        self.stored: set[str] = set()
        is_class = isinstance(code, type)
        classes = code.__mro__ if is_class else ()
        self._bases = [base for base in classes if not of_a_library(base.__module__)]
        # Of a block it is its own class whose attributes ``type(self)`` writes.
        self._class = code if is_class else None
        pending = [getattr(code, "block_class", code).forward if is_class else code]
        for value in pending:  # grows while it is walked
            if len(self._seen) >= _MOST_FUNCTIONS:
                break
            pending += self._named_by(value)

    def _named_by(self, value: Any) -> Iterator[Any]:
        """The values that a function or what wraps one names; their places are noted."""
        value = _unbound(value)
        if isinstance(value, functools.partial):
            yield from (value.func, *value.args, *value.keywords.values())
            return
        if isinstance(value, _CACHED):
            value = value.__wrapped__
        if not isinstance(value, types.FunctionType) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if of_a_library(value.__globals__.get("__name__", "")):  # a decorator's, say
            yield from map(_in_cell, value.__closure__ or ())
            return
        self.functions.append(value)
        for name in _OF_A_FUNCTION:
            yield from self._note(value, name)
        code = value.__code__
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            yield from self._note(cell, name)
        names = _names(code)
        self.names |= names
        self.stored |= _stored(code)
        for name in names & value.__globals__.keys():
            yield from self._found(value.__globals__, name, names)
        for base in self._bases:
            for name in names & vars(base).keys():
                yield from self._found(base, name, names)
                if base is not self._class and not hasattr(vars(base)[name], "__get__"):
                    yield from self._note(self._class, name)

    def _found(self, owner: Any, name: str, names: frozenset[str]) -> Iterator[Any]:
        for value in self._note(owner, name):
            yield value
            if isinstance(value, types.ModuleType) and not of_a_library(value.__name__):
                for inner in names & vars(value).keys():
                    yield from self._note(vars(value), inner)
            elif _is_own_class(value):
                for inner in names & vars(value).keys():
                    yield from self._note(value, inner)

    def _note(self, owner: Any, name: str) -> Iterator[Any]:
        place = Place(owner, name)
        if place.key not in self._by_id:
            self._by_id.add(place.key)
            self.places.append(place)
            yield place.value()


def _is_own_class(value: Any) -> bool:
    if not isinstance(value, type) or of_a_library(value.__module__):
        return False
    return not issubclass(value, nn.Module)


def _unbound(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (types.MethodType, staticmethod, classmethod)):
        return value.__func__
    return value


def made_by(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of the functions that this code makes."""
    return (const for const in code.co_consts if isinstance(const, types.CodeType))


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """All names in the code and in the functions that it makes; strings are names to getattr."""
    texts = (const for const in code.co_consts if isinstance(const, str) and const.isidentifier())
    return frozenset(code.co_names).union(texts, *map(_names, made_by(code)))


@functools.lru_cache(4096)
def _stored(code: types.CodeType) -> frozenset[str]:
    """The attributes that the code and the functions that it makes write; where one is written by
    a name that is a value, all texts in the code."""
    own = {str(i.argval) for i in dis.get_instructions(code) if i.opname in _STORES}
    if not _WRITERS.isdisjoint(code.co_names):
        own |= {const for const in code.co_consts if isinstance(const, str)}
    return frozenset(own).union(*map(_stored, made_by(code)))


_STORES = ("STORE_ATTR", "DELETE_ATTR")
_WRITERS = frozenset({"setattr", "delattr", "__setattr__", "__dict__", "vars", "register_buffer"})


def of_a_library(module: str) -> bool:
    """Whether nothing there is looked into: libraries, and transformers but for its models."""
    if module.startswith("transformers."):
        return not module.startswith(("transformers.models.", "transformers.integrations."))
    return module.partition(".")[0] in _LIBRARIES
