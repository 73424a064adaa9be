"""The arguments of a graph's nodes as JSON values and back.

    (mul, 2, slice(None, 8), torch.float32)
 <->
    [{"node": "mul"}, 2, {"slice": [null, 8, null]}, {"dtype": "float32"}]

What JSON has is written as it is; everything else is an object of one field, named by its kind.
There is no kind whose reading would run anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from liger_fx.errors import LoadError, SaveError
from liger_fx.storage.checks import LIST, OBJECT, STRING, expect, identifier
from liger_fx.storage.json_file import shown

_MAX_DEPTH = 16
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", re.ASCII)
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
    )
}  # fmt: skip


class Devices:
    """Reads devices; ``moved`` maps a device of the file to the one that takes its place."""

    def __init__(self, moved: Mapping[torch.device, torch.device] | None = None) -> None:
        self.moved = moved or {}

    @property
    def from_meta(self) -> bool:
        """Whether the graph was made without a device, for whichever it comes to."""
        return any(old.type == "meta" for old in self.moved)

    def read(self, name: Any, place: str = "") -> torch.device:
        """The device that the file names, or the one in its place."""
        expect(name, STRING, place)
        if not _DEVICE.fullmatch(name):
            raise LoadError(f"{shown(name)} is no device", place)
        device = torch.device(name)
        return self.moved.get(device, device)

    def type_for(self, device_type: str) -> str:
        """The type of device in the place of one of this type."""
        types = {old.type: new.type for old, new in self.moved.items()}
        moved = types.get(device_type, device_type)
        return device_type if moved == "meta" else moved  # it computes nothing


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, say; SaveError for a dtype that no file has."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SaveError(f"A saved graph cannot hold the dtype {dtype}.")
    return name


def read_dtype(name: Any, place: str = "") -> torch.dtype:
    """The dtype of that name."""
    return _named(DTYPES, name, "dtype", place)


def encode(value: Any) -> Any:
    """An argument tree as JSON values; SaveError for what has no form there."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if kind is slice:
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    return _encode_torch(value)


def _encode_torch(value: Any) -> Any:
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, known in (("layout", _LAYOUTS), ("memory_format", _MEMORY_FORMATS)):
        name = str(value).removeprefix("torch.")
        if known.get(name) is value:
            return {kind: name}
    raise SaveError(f"A saved graph cannot hold a {type(value).__name__} ({value!r:.60}).")


def decode(value: Any, nodes: Mapping[str, fx.Node], devices: Devices, depth: int = 0) -> Any:
    """The argument tree that ``encode`` wrote; ``nodes`` are those before it, by name."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        if not -(2**63) <= value < 2**64:
            raise LoadError(f"{shown(value)} is too large an integer")
        return value
    if depth > _MAX_DEPTH:
        raise LoadError("is nested too deeply")
    if kind is list:
        return _items(value, nodes, devices, depth)
    if len(value) != 1:
        raise LoadError(f"has {len(value)} fields where a value has one")
    ((name, content),) = value.items()
    if name == "node":
        return _node(content, nodes)
    reader = _READERS.get(name)
    if reader is None:
        raise LoadError(f"{shown(name)} is no kind of value")
    try:
        return reader(content, nodes, devices, depth + 1)
    except LoadError as error:
        raise error.inside(name) from None


def _node(name: Any, nodes: Mapping[str, fx.Node]) -> fx.Node:
    node = nodes.get(name) if type(name) is str else None
    if node is None:
        raise LoadError(f"{shown(name)} is no earlier node")
    return node


def _items(value: Any, nodes: Mapping[str, fx.Node], devices: Devices, depth: int) -> list[Any]:
    found = []
    for i, item in enumerate(expect(value, LIST)):
        try:
            found.append(decode(item, nodes, devices, depth + 1))
        except LoadError as error:
            raise error.inside(f"[{i}]") from None
    return found


def _tuple(value: Any, nodes: Any, devices: Devices, depth: int) -> tuple[Any, ...]:
    return tuple(_items(value, nodes, devices, depth))


def _dict(value: Any, nodes: Any, devices: Devices, depth: int) -> dict[str, Any]:
    entries = expect(value, OBJECT).items()
    return {identifier(k, ""): decode(item, nodes, devices, depth) for k, item in entries}


def _slice(value: Any, nodes: Any, devices: Devices, depth: int) -> slice:
    parts = _items(value, nodes, devices, depth)
    if len(parts) != 3:
        raise LoadError(f"has {len(parts)} parts, not 3")
    for part in parts:
        if not (part is None or type(part) is int or isinstance(part, fx.Node)):
            raise LoadError(f"{shown(part)} is no bound")
    return slice(*parts)


def _ellipsis(value: Any, nodes: Any, devices: Devices, depth: int) -> Any:
    if value is not True:
        raise LoadError("is not true")
    return ...


def _named(known: Mapping[str, Any], name: Any, kind: str, place: str = "") -> Any:
    if type(name) is not str or name not in known:
        raise LoadError(f"{shown(name)} is no {kind}", place)
    return known[name]


_READERS: dict[str, Callable[[Any, Any, Devices, int], Any]] = {
    "tuple": _tuple,
    "dict": _dict,
    "slice": _slice,
    "ellipsis": _ellipsis,
    "float": lambda value, *_: _named(_FLOATS, value, "number"),
    "dtype": lambda value, *_: read_dtype(value),
    "device": lambda value, nodes, devices, depth: devices.read(value),
    "layout": lambda value, *_: _named(_LAYOUTS, value, "layout"),
    "memory_format": lambda value, *_: _named(_MEMORY_FORMATS, value, "memory format"),
}
