"""Dataclasses of plain values to JSON values and back, led by the types of their fields.

TreeRow("mlp", "LlamaMLP", "")   <->   {"path": "mlp", "class_name": "LlamaMLP", "detail": ""}
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


class Malformed(Exception):
    """A value that is not of the type it should be; the text names the field."""


def encode(value: Any, tables: Mapping[type, Mapping[Any, int]] | None = None) -> Any:
    """Dataclasses as objects, tuples as lists; everything else is JSON already.

    tables: types of which only the place in a list is written down, and those places.
    """
    if tables and type(value) in tables:
        return tables[type(value)][value]
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name), tables) for field in fields(value)}
    if isinstance(value, tuple):
        return [encode(item, tables) for item in value]
    if isinstance(value, dict):
        return {key: encode(item, tables) for key, item in value.items()}
    return value


def decode(
    kind: Any, value: Any, where: str, tables: Mapping[type, Sequence[Any]] | None = None
) -> Any:
    """The value of type ``kind`` that was encoded to ``value``; Malformed, naming ``where``.

    kind: str, int, float, bool, None, a dataclass, and tuples, dicts and unions of these.
    tables: types that are written down as places in a list, and those lists.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(kind, value, where, tables)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value, where, tables)
    if origin is dict:
        entries = _expect(value, dict, where)
        inner = get_args(kind)[1]
        found = {key: decode(inner, v, _below(where, key), tables) for key, v in entries.items()}
        return {_shown(key, _below(where, key)): item for key, item in found.items()}
    if tables and kind in tables:
        place = _expect(value, int, where)
        if not 0 <= place < len(tables[kind]):
            raise Malformed(f"{where} is {place}, of {len(tables[kind])}")
        return tables[kind][place]
    if is_dataclass(kind):
        return _decode_fields(kind, value, where, tables)
    return _expect(value, kind, where)


def _decode_union(kind: Any, value: Any, where: str, tables: Any) -> Any:
    members = get_args(kind)
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    for member in members[:-1]:
        if type(value) is member:
            return value
    return decode(members[-1], value, where, tables)


def _decode_tuple(members: tuple[Any, ...], value: Any, where: str, tables: Any) -> Any:
    items = _expect(value, list, where)
    if members[-1] is Ellipsis:
        members = members[:1] * len(items)
    if len(items) != len(members):
        raise Malformed(f"{where} has {len(items)} items, not {len(members)}")
    pairs = enumerate(zip(members, items, strict=True))
    return tuple(decode(member, item, f"{where}[{i}]", tables) for i, (member, item) in pairs)


def _decode_fields(kind: Any, value: Any, where: str, tables: Any) -> Any:
    given = _expect(value, dict, where)
    known = _fields(kind)
    for name in given:
        if name not in known:
            raise Malformed(f"{_below(where, name)} is unknown")
    for name in known:
        if name not in given:
            raise Malformed(f"{_below(where, name)} is missing")
    return kind(**{n: decode(known[n], v, _below(where, n), tables) for n, v in given.items()})


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _below(where: str, name: str) -> str:
    """The place of a field; a name that would not show as it is stands in quotes."""
    shown = name if name.isprintable() else repr(name)
    return f"{where}.{shown}" if where else shown


def _expect(value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not kind:
        raise Malformed(f"{where or 'the whole'} is a {type(value).__name__}, not {kind.__name__}")
    return _shown(value, where) if isinstance(value, str) else value


def _shown(text: str, where: str) -> str:
    """``text``, of characters that a terminal shows; others it would obey."""
    if not (text.isprintable() or re.sub(r"[\n\t]", "", text).isprintable()):
        raise Malformed(f"{where} has characters that are not printable")
    return text
