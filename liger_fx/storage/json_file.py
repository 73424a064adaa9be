"""JSON as saved graphs use it: read strictly, written so that equal data give equal bytes.

{"a": 1, "a": 2}, NaN, 1e999, "\\ud800", [[[[...]]]], gigabytes    ->  LoadError
{"nodes": [{"name": "x", ...}, {"name": "y", ...}]}               ->  a line for each node
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from liger_fx.codec import shown
from liger_fx.errors import LoadError

GRAPH_BYTES = 256 * 2**20
REPORT_BYTES = 64 * 2**20
CONFIG_BYTES = 4 * 2**20
_MAX_DEPTH = 100
# Sixty or more in what is saved. An empty list of two bytes would take sixty in memory.
_BYTES_A_NEST = 8
_HALF = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
_WIDTH = 100


def parse(data: bytes, max_bytes: int = GRAPH_BYTES) -> Any:
    """The value of a JSON text; LoadError, without the file's name, for what is not plain JSON."""
    if len(data) > max_bytes:
        raise LoadError(f"has {len(data):,} bytes, more than the {max_bytes:,} that are read")
    if data.count(b"[") + data.count(b"{") > len(data) // _BYTES_A_NEST + 1000:
        raise LoadError("has far more lists and objects than values in them")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise LoadError("is nested too deeply") from None
    except ValueError as error:  # JSON, UTF-8, or a number of too many digits
        raise LoadError(f"is no JSON text: {error}") from None
    _check_depth(value)
    if _HALF.search(text) and not _is_encodable(value):
        raise LoadError("has half of a pair of surrogates, which is no character")
    return value


def _is_encodable(value: Any) -> bool:
    """Whether all its strings are text; an escape in JSON may be half of a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        count = Counter(name for name, _ in pairs)
        twice = count.most_common(1)[0][0]
        raise LoadError(f"has the field {shown(twice)} twice in one object")
    return found


def _refuse_constant(text: str) -> None:
    raise LoadError(f"has the number {text}, which is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise LoadError(f"has the number {shown(text)}, which is too large")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [nest for parent in level for nest in _nests(parent)]
        if not level:
            return
    raise LoadError("is nested too deeply")


def _nests(value: Any) -> list[Any]:
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    return [item for item in items if type(item) in (dict, list)]


def dump(value: Any) -> bytes:
    """The value as indented JSON text; what fits a line stands on one."""
    return (_text(value, 0) + "\n").encode()


def _text(value: Any, indent: int) -> str:
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if indent + len(flat) <= _WIDTH or not _is_nest(value):
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, Mapping):
        inner = [f"{pad}{json.dumps(k)}: {_text(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * indent + "}"
    inner = [pad + _text(item, indent + 1) for item in value]
    return "[\n" + ",\n".join(inner) + "\n" + " " * indent + "]"


def _is_nest(value: Any) -> bool:
    """Whether each item gets a line: it holds objects or lists that are not empty."""
    items = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list):
        return False
    return any(isinstance(item, Mapping | list) and item for item in items)
