"""The containers that a block returns, and those that it is given.

    Point(x=h, n=2), a named tuple  ->  container("geometry:Point", [h, 2])
    {Kind.SUM: h}                   ->  container("builtins:dict", [(resolve("kinds:Kind.SUM"), h)])
    seen.append(h), seen is given   ->  refused: a graph is given what is in the list

They come out in their class, or CannotRecord says that they cannot.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from liger_fx.tracing import leaves
from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.fakes import node_of
from liger_fx.tracing.functions import importable
from liger_fx.tracing.recorder import Recorder

# Written into a graph as they stand.
_CONSTANTS = (
    type(None), bool, int, float, complex, str, type(...), slice, torch.dtype, torch.device,
    torch.layout, torch.memory_format,
)  # fmt: skip
_PLAIN_KEYS = (str, bool, int, type(None))
_BASES = (tuple, list, dict)
# Classes whose own constructor makes them of their items.
_OF_ITEMS = (torch.Size, collections.OrderedDict)


class GivenContainers:
    """The lists and mappings among the arguments of a call, and what is in them. ``name``: of the
    argument."""

    def __init__(self, arguments: Iterable[tuple[str, Any]]) -> None:
        self._held = [
            (name, value, _items_of(value))
            for name, argument in arguments
            for value in _mutable_in(argument)
        ]
        self.ids = {id(value) for _, value, _ in self._held}

    def refuse_changes(self) -> None:
        """CannotRecord where something else is in one of them than was."""
        for name, value, then in self._held:
            now = _items_of(value)
            if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
                raise CannotRecord(f"{name}, a {type(value).__name__} that is given, is changed")


@contextmanager
def containers_kept(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """CannotRecord where a call with these arguments, made inside, changes what is in one."""
    given = GivenContainers([*(("an argument", arg) for arg in args), *kwargs.items()])
    yield
    given.refuse_changes()


def _items_of(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _mutable_in(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, dict)):
        yield value
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _mutable_in(item)


class ContainerWriter:
    """Writes one tree, a result or an argument of a block, as a node takes it: torch.fx makes plain
    lists and dicts of all lists and mappings. ``given``: containers that cannot come back."""

    def __init__(self, recorder: Recorder, given: Iterable[int] = ()) -> None:
        self.recorder, self.given = recorder, set(given)
        self._times: Counter[int] = Counter()
        self._known: dict[int, Any] = {}

    def write(self, tree: Any) -> Any:
        """The tree with nodes for what is no plain container."""
        self._count(tree)
        return self._written(tree)

    def _count(self, value: Any) -> None:
        if (parts := _parts(value)) is None:
            return
        self._times[id(value)] += 1
        if self._times[id(value)] == 1:
            for part in parts:
                self._count(part)

    def _written(self, value: Any) -> Any:
        if _parts(value) is None:
            return self._leaf(value)
        if id(value) in self.given and not isinstance(value, tuple):
            raise CannotRecord(f"a {type(value).__name__} that is given comes back")
        if id(value) not in self._known:
            self._known[id(value)] = None  # while what is in it is written
            self._known[id(value)] = self._container(value)
        found = self._known[id(value)]
        if found is None:
            raise CannotRecord(f"a {type(value).__name__} that holds itself")
        return found

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if leaves.is_output_class(kind):
            fields = {key: self._written(item) for key, item in value.items()}
            return self._node(leaves.model_output, leaves.reference_to(kind), **fields)
        is_shared = self._times[id(value)] > 1 and kind is not tuple
        if isinstance(value, dict):
            is_plain = kind is dict and all(type(key) in _PLAIN_KEYS for key in value)
            if is_plain and not is_shared:
                return {key: self._written(item) for key, item in value.items()}
            items: Any = [(self._written(k), self._written(v)) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            items = [self._written(item) for item in value]
            if kind in (list, tuple) and not is_shared:
                return kind(items)
        else:
            items = [(key, self._written(item)) for key, item in _fields_of(value).items()]
        _refuse_more(value)
        return self._node(leaves.container, importable(kind), items)

    def _leaf(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, enum.Enum) and kind.__members__.get(value.name) is value:
            return self._node(leaves.resolve, f"{importable(kind)}.{value.name}")
        if isinstance(value, _CONSTANTS) and kind not in _CONSTANTS and node_of(value) is None:
            raise CannotRecord(f"a {kind.__name__}, which is more than its value")
        if kind.__module__ == "numpy":
            raise CannotRecord(f"a {kind.__name__} of numpy")
        return self.recorder.argument(value)

    def _node(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.recorder.create_node("call_function", target, args, kwargs)


def _parts(value: Any) -> Iterable[Any] | None:
    """What is in a container; None for anything else."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return value
    if is_data_object(value):
        return list(_fields_of(value).values())
    return None


def is_data_object(value: Any) -> bool:
    """Whether it is an object of a dataclass, and no mapping."""
    other = (type, dict, torch.nn.Module)
    return dataclasses.is_dataclass(value) and not isinstance(value, other)


def _fields_of(value: Any) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(value))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _refuse_more(value: Any) -> None:
    """CannotRecord for a container that is more than its items."""
    kind = type(value)
    held = vars(value).keys() if hasattr(value, "__dict__") else set()
    if is_data_object(value):
        is_more = not held <= _fields_of(value).keys()
    else:
        base = next(base for base in _BASES if isinstance(value, base))
        own = (kind.__new__, kind.__init__) != (base.__new__, base.__init__)
        is_named = hasattr(kind, "_make") or kind.__module__ == "torch.return_types"
        is_more = bool(held) or (own and not is_named and kind not in _OF_ITEMS)
    if is_more:
        raise CannotRecord(f"a {kind.__name__}, which is more than its items")
