"""graph.json as a whole: read and checked without building anything.

docs/graph-format.md describes each field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from liger_fx.codec import decode, expect, inside, shown
from liger_fx.errors import LoadError
from liger_fx.storage import named_modules
from liger_fx.storage.names import FORMAT
from liger_fx.storage.records import Document
from liger_fx.storage.values import FORMS

SCHEMA = 1


def read(raw: Any) -> Document:
    """The document of a parsed graph.json; the nodes of its graphs are read later.

    LoadError, naming the field, for the first thing that is wrong.
    """
    _check_schema(raw)
    found: Document = decode(Document, raw, FORMS)
    for i, record in enumerate(found.named_modules):
        with inside(f"named_modules[{i}]"):
            named_modules.check(record)
    _check_once("modules", ([path] for path, *_ in found.modules))
    _check_once("tensors", ([record.path] for record in found.tensors))
    _check_once("named_modules", ([record.path, *record.also] for record in found.named_modules))
    _check_paths(found)
    return found


def _check_schema(raw: Any) -> None:
    expect(raw, dict)
    if raw.get("format") != FORMAT:
        raise LoadError(f"is {shown(raw.get('format'))}, not {FORMAT!r}", "format")
    schema = raw.get("schema")
    if type(schema) is not int or schema < 1:
        raise LoadError(f"{shown(schema)} is no version of the format", "schema")
    if schema > SCHEMA:
        raise LoadError(
            f"is {schema}, of a later liger_fx; this one reads versions up to {SCHEMA}", "schema"
        )


def _check_once(field: str, paths: Iterable[list[str]]) -> None:
    seen: set[str] = set()
    for i, of_record in enumerate(paths):
        for path in of_record:
            if path in seen:
                raise LoadError(f"{shown(path)} is described twice", f"{field}[{i}]")
            seen.add(path)


def _check_paths(found: Document) -> None:
    """What is said of modules is said of those that the file lists."""
    ours = {path for path, *_ in found.modules}
    for i, plan in enumerate(found.plans):
        for j, path in enumerate(plan.followed):
            if path not in ours:
                raise LoadError(f"there is no module {path}", f"plans[{i}].followed[{j}]")
    for record in found.named_modules:
        ours |= {record.path, *record.also}
    for i, path in enumerate(found.other_modes):
        if path not in ours:
            raise LoadError(f"there is no module {path}", f"other_modes[{i}]")
