"""Small checks of what a file says; each failure is one LoadError that names the field.

fields({"name": 3}, {"name": (str,)})   ->   LoadError("name: is an integer, not a string")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from keyword import iskeyword
from types import NoneType
from typing import Any

from liger_fx.errors import LoadError
from liger_fx.storage.json_file import shown

Kinds = tuple[type, ...]

STRING: Kinds = (str,)
NUMBER: Kinds = (int,)
FLAG: Kinds = (bool,)
LIST: Kinds = (list,)
OBJECT: Kinds = (dict,)
OPTIONAL_OBJECT: Kinds = (dict, NoneType)
OPTIONAL_LIST: Kinds = (list, NoneType)
OPTIONAL_STRING: Kinds = (str, NoneType)

_NAMES = {
    dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number",
    bool: "true or false", NoneType: "null",
}  # fmt: skip
_PATH = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,60}", re.ASCII)
_NOTHING: Mapping[str, Kinds] = {}


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Completes the place of a LoadError raised in the block."""
    try:
        yield
    except LoadError as error:
        raise error.inside(place) from None


def fields(
    value: Any, required: Mapping[str, Kinds], optional: Mapping[str, Kinds] = _NOTHING
) -> dict[str, Any]:
    """``value``, an object that has these fields of these types and no others."""
    expect(value, OBJECT)
    for name, item in value.items():
        kinds = required.get(name) or optional.get(name)
        if kinds is None:
            raise LoadError(f"has the unknown field {shown(name)}")
        if type(item) not in kinds:
            raise LoadError(_mismatch(item, kinds), name)
    if len(value) < len(required) + len(optional):
        for name in required:
            if name not in value:
                raise LoadError("is missing", name)
    return value


def expect(value: Any, kinds: Kinds, place: str = "") -> Any:
    """``value``, which is of one of these types."""
    if type(value) not in kinds:
        raise LoadError(_mismatch(value, kinds), place)
    return value


def _mismatch(value: Any, kinds: Kinds) -> str:
    return f"is {_NAMES[type(value)]}, not {' or '.join(_NAMES[kind] for kind in kinds)}"


def strings(value: Any, place: str) -> list[str]:
    """``value``, a list of strings."""
    for i, item in enumerate(expect(value, LIST, place)):
        expect(item, STRING, f"{place}[{i}]")
    return value


def identifier(value: Any, place: str) -> str:
    """``value``, a name that can stand in generated Python code; none of Python's own."""
    expect(value, STRING, place)
    fits = value.isascii() and value.isidentifier() and len(value) <= 500
    if not fits or iskeyword(value) or value.startswith("__"):
        raise LoadError(f"{shown(value)} is no name", place)
    return value


def part_of_path(value: Any, place: str) -> str:
    """``value``, one name or number of a module path."""
    if "." in module_path(value, place):
        raise LoadError(f"{shown(value)} is no name of a module", place)
    return str(value)


def module_path(value: Any, place: str, *, root: bool = False) -> str:
    """``value``, names and numbers with dots between; empty for the model, where ``root`` may be.

    No part has two leading underscores, so that a path leads to nothing of Python's own.
    """
    expect(value, STRING, place)
    if value == "" and root:
        return ""
    if not _PATH.fullmatch(value) or value.startswith("__") or ".__" in value:
        raise LoadError(f"{shown(value)} is no path of a module or tensor", place)
    return value
