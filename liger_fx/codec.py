"""Dataclasses of plain values to JSON values and back, led by the types of their fields.

    TreeRow("mlp", "LlamaMLP", "")   <->   {"path": "mlp", "class_name": "LlamaMLP", "detail": ""}
    {"path": 3, ...}                  ->   LoadError("path: is an integer, not a string")

A type is one that JSON has, a dataclass, or a tuple, list, dict, Literal or union of types.
``Annotated`` adds functions that take what was read and return it, or raise a LoadError. A field
named ``class_`` is written as ``class``; one that is ``absent`` where it has its default is left
out. Reading makes values of these types and nothing else, and names the first place that is wrong.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, field, fields, is_dataclass
from itertools import cycle
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from liger_fx.errors import LoadError

T = TypeVar("T")


class Form(NamedTuple):
    """How values of one type are written as JSON values, and read again."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


Forms = Mapping[Any, Form]
Reader = Callable[[Any, Forms], Any]

_NO_FORMS: Forms = types.MappingProxyType({})
_NAMES: dict[Any, str] = {
    dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number",
    bool: "true or false", types.NoneType: "null",
}  # fmt: skip


def absent(default: T) -> T:
    """The default of a field that is not written down where it has this value."""
    made: Any = field(default_factory=lambda: copy.copy(default), metadata={"absent": True})
    found: T = made
    return found


class inside:
    """Completes the place of a LoadError raised in the block."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, LoadError):
            raise error.inside(self.place) from None


def shown(value: Any) -> str:
    """A value from a file as an error shows it: quoted, in ASCII, and not too long."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def encode(value: Any, forms: Forms = _NO_FORMS) -> Any:
    """Dataclasses as objects, tuples as lists, types of ``forms`` as these say; everything else is
    JSON already."""
    form = forms.get(type(value))
    if form is not None:
        return form.write(value)
    if is_dataclass(value):
        return {
            _written(f): encode(getattr(value, f.name), forms)
            for f in fields(value)
            if not (f.metadata.get("absent") and getattr(value, f.name) == _default(f))
        }
    if isinstance(value, tuple | list):
        return [encode(item, forms) for item in value]
    if isinstance(value, dict):
        return {key: encode(item, forms) for key, item in value.items()}
    return value


def decode(kind: Any, value: Any, forms: Forms = _NO_FORMS) -> Any:
    """The value of type ``kind`` that was encoded to ``value``; LoadError, naming the field."""
    return _reader(kind)(value, forms)


def expect(value: Any, *kinds: type) -> Any:
    """``value``, which is of one of these types."""
    if type(value) not in kinds:
        wanted = " or ".join(_NAMES[kind] for kind in kinds)
        raise LoadError(f"is {_NAMES.get(type(value), shown(value))}, not {wanted}")
    return value


def _written(of: Field[Any]) -> str:
    return of.name.removesuffix("_")


def _default(of: Field[Any]) -> Any:
    return of.default_factory() if callable(of.default_factory) else of.default


@functools.cache
def _reader(kind: Any) -> Reader:
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, forms: value
    if origin is Annotated:
        return _checked(_reader(members[0]), members[1:])
    if origin in (Union, types.UnionType):
        return _union(members)
    if origin is Literal:
        return _one_of(members)
    if origin in (tuple, list):
        return _items(origin, members)
    if origin is dict:
        return _entries(*map(_reader, members))
    return _record(kind) if is_dataclass(kind) else _basic(kind)


def _checked(read: Reader, checks: Iterable[Callable[[Any], Any]]) -> Reader:
    def checked(value: Any, forms: Forms) -> Any:
        found = read(value, forms)
        for check in checks:
            found = check(found)
        return found

    return checked


def _union(members: tuple[Any, ...]) -> Reader:
    """Of types that JSON has, and at most one other."""
    basic = tuple(m for m in members if m in _NAMES and m is not float)
    readers = {m: _basic(m) for m in basic}
    others = [_reader(m) for m in members if m not in basic]

    def union(value: Any, forms: Forms) -> Any:
        if type(value) in readers or not others:
            expect(value, *basic)
            return readers[type(value)](value, forms)
        return others[0](value, forms)

    return union


def _one_of(members: tuple[Any, ...]) -> Reader:
    def one_of(value: Any, forms: Forms) -> Any:
        for member in members:
            if type(value) is type(member) and value == member:
                return member
        raise LoadError(f"is {shown(value)}, not one of {', '.join(map(str, members))}")

    return one_of


def _items(origin: type, members: tuple[Any, ...]) -> Reader:
    readers = [_reader(member) for member in members if member is not Ellipsis]
    count = len(members) if origin is tuple and members[-1] is not Ellipsis else None

    def items(value: Any, forms: Forms) -> Any:
        expect(value, list)
        if count is not None and len(value) != count:
            raise LoadError(f"has {len(value)} items, not {count}")
        found: list[Any] = []
        try:
            for read, item in zip(readers if count else cycle(readers), value, strict=False):
                found.append(read(item, forms))
        except LoadError as error:
            raise error.inside(f"[{len(found)}]") from None
        return origin(found)

    return items


def _entries(read_key: Reader, read: Reader) -> Reader:
    def entries(value: Any, forms: Forms) -> dict[Any, Any]:
        found = {}
        for key, item in expect(value, dict).items():
            try:
                found[read_key(key, forms)] = read(item, forms)
            except LoadError as error:
                raise error.inside(key if key.isidentifier() else shown(key)) from None
        return found

    return entries


def _record(kind: Any) -> Reader:
    hints = get_type_hints(kind, include_extras=True)
    known = {_written(f): (f.name, _reader(hints[f.name])) for f in fields(kind)}
    needed = [_written(f) for f in fields(kind) if not f.metadata.get("absent")]

    def record(value: Any, forms: Forms) -> Any:
        if kind in forms:
            return forms[kind].read(value)
        found = {}
        for name, item in expect(value, dict).items():
            if name not in known:
                raise LoadError(f"has the unknown field {shown(name)}")
            attribute, read = known[name]
            try:
                found[attribute] = read(item, forms)
            except LoadError as error:
                raise error.inside(name) from None
        for name in needed:
            if name not in value:
                raise LoadError("is missing", name)
        return kind(**found)

    return record


def _basic(kind: Any) -> Reader:
    def basic(value: Any, forms: Forms) -> Any:
        if kind in forms:
            return forms[kind].read(value)
        if kind is float and type(value) in (int, float):
            if abs(value) <= sys.float_info.max:  # neither infinite nor NaN
                return float(value)
            raise LoadError("is no finite number")
        return expect(value, kind)

    return basic
