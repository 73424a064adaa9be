"""Whether a value that a graph took for a constant is as it was: itself, and all that it holds.

module.scaling = 0.5            ->  the same number, of the same type
module.table = {"a": [1, 2]}    ->  the same items, as deep as they go
module.mix = partial(f, k=2)    ->  the same function and arguments
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.check import Check
from liger_fx.tracing.contents import Kind, is_same, look_at

_PLAIN = (*PLAIN, complex, bytes)
_SIZED = (dict, list, set)
_TRACING = __name__.rpartition(".")[0]


class Held:
    """What a value was and held when it was seen."""

    def __init__(self, value: Any) -> None:
        self._picture = picture(value)

    def equals(self, value: Any) -> bool:
        """Whether it is a value like that one was."""
        return bool(picture(value) == self._picture)

    def add_to(self, check: Check, now: Any, place: str, *values: Any) -> None:
        """Add that at ``place``, an expression over ``values`` where ``now`` is at the moment, such
        a value is.

        That it is the very object, with the very objects in it, is told quickly; only where it is
        not are both compared item by item.
        """
        now = original(now)
        if not self.equals(now):
            check.add(f"{{}}({place})", self.equals, *values)
            return
        inside = [(one, kind, kind.read(one)) for one, kind in _containers(now)]
        filled = [one for one in inside if type(one[0]) not in _SIZED or one[0]]
        same = [f"{place} is {{}}", *["not {}"] * (len(inside) - len(filled))]
        same += ["{}()"] * bool(filled)
        empty = [one for one, _, _ in inside if type(one) in _SIZED and not one]
        unchanged = [functools.partial(_hold_the_same, filled)] * bool(filled)
        condition = f"{' and '.join(same)} or {{}}({place})"
        check.add(condition, *values, now, *empty, *unchanged, self.equals, *values)


def _hold_the_same(containers: list[tuple[Any, Kind, Any]]) -> bool:
    return all(is_same(then, kind.read(one)) for one, kind, then in containers)


def _containers(value: Any) -> Iterator[tuple[Any, Kind]]:
    """The mutable containers in a value and in these, each once; not those of modules."""
    seen, pending = set[int](), [value]
    for one in pending:  # grows while it is walked
        if isinstance(one, tuple):
            pending += one
        elif not isinstance(one, nn.Module) and id(one) not in seen:
            cls: Any = type(one)
            look = look_at(cls)
            if look is None:
                continue
            seen.add(id(one))
            if look.attributes:
                pending.append(vars(one))
            if look.kind is not None:
                pending += look.kind.items(look.kind.read(one))
                yield one, look.kind


def original(value: Any) -> Any:
    """The function in whose place a trace has put another for as long as it runs; any other value
    as it is."""
    is_function = isinstance(value, types.FunctionType)
    if is_function and str(value.__globals__.get("__name__")).startswith(_TRACING):
        return getattr(value, "__wrapped__", value)
    return value


class _Object:
    """Stands for an object that is compared by identity, and keeps it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def picture(value: Any, seen: dict[int, int] | None = None) -> Any:
    """What a value is and holds, to be compared with ``==``: 1 is not True, 0.0 is not -0.0, nan is
    nan. What cannot be looked into is compared by identity; so are tensors and modules.

    seen: what was met on the way, in that order.
    """
    cls: Any = type(value)
    if isinstance(value, _PLAIN):
        return cls, repr(value) if isinstance(value, (float, complex)) else value
    seen = {} if seen is None else seen
    if isinstance(value, tuple):
        return cls, tuple(picture(item, seen) for item in value)
    if isinstance(value, (staticmethod, classmethod)):
        return cls, picture(value.__func__, seen)
    look = None if isinstance(value, nn.Module) else look_at(cls)
    if look is None:
        return _Object(original(value))
    if id(value) in seen:
        return cls, seen[id(value)]
    seen[id(value)] = len(seen)
    parts: list[Any] = [cls]
    if look.attributes:
        parts.append(_picture_of_read(vars(value), seen))
    if look.kind is not None:
        parts.append(_picture_of_read(look.kind.read(value), seen))
    return tuple(parts)


def _picture_of_read(read: Any, seen: dict[int, int]) -> Any:
    if isinstance(read, np.ndarray):
        return (
            read.dtype.str,
            read.shape,
            read.tobytes() if not read.dtype.hasobject else repr(read),
        )
    if isinstance(read, dict):
        return tuple((picture(key, seen), picture(item, seen)) for key, item in read.items())
    if isinstance(read, set):
        return frozenset(map(_hashable, read))
    return read if isinstance(read, bytes) else tuple(picture(item, seen) for item in read)


def _hashable(item: Any) -> Any:
    return (type(item), item) if isinstance(item, _PLAIN) else id(item)
