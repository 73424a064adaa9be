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
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from liger_fx.codec import Form, expect, shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage.checks import identifier

_MAX_DEPTH = 16
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", re.ASCII)
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DTYPES = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
)  # fmt: skip
_MEMORY_FORMATS = (
    torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
)  # fmt: skip


def _by_name(*values: Any) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in values}


_NAMED: dict[str, dict[str, Any]] = {
    "float": _FLOATS,
    "dtype": _by_name(*_DTYPES),
    "layout": _by_name(torch.strided),
    "memory_format": _by_name(*_MEMORY_FORMATS),
}


class Devices:
    """The devices of a graph; ``moved`` maps one of the file to the one that takes its place."""

    def __init__(self, moved: Mapping[torch.device, torch.device] | None = None) -> None:
        self.moved = moved or {}

    @classmethod
    def from_to(cls, saved: torch.device, device: torch.device) -> Devices:
        """Those of a graph that was made on one device and is to run on another."""
        same = saved == device
        return cls(None if same else {saved: device, torch.device(saved.type): device})

    @property
    def from_meta(self) -> bool:
        """Whether the graph was made without a device, for whichever it comes to."""
        return any(old.type == "meta" for old in self.moved)

    def place_of(self, device: torch.device) -> torch.device:
        """The device itself, or the one in its place."""
        return self.moved.get(device, device)

    def type_for(self, device_type: str) -> str:
        """The type of device in the place of one of this type."""
        types = {old.type: new.type for old, new in self.moved.items()}
        moved = types.get(device_type, device_type)
        return device_type if moved == "meta" else moved  # it computes nothing


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, say; SaveError for a dtype that no file has."""
    if dtype not in _DTYPES:
        raise SaveError(f"A saved graph cannot hold the dtype {dtype}.")
    return str(dtype).removeprefix("torch.")


def read_dtype(name: Any) -> torch.dtype:
    """The dtype of that name."""
    found: torch.dtype = _named("dtype", name)
    return found


def read_device(name: Any) -> torch.device:
    """The device of that name, as the file has it."""
    if not _DEVICE.fullmatch(expect(name, str)):
        raise LoadError(f"{shown(name)} is no device")
    return torch.device(name)


FORMS = {torch.dtype: Form(dtype_name, read_dtype), torch.device: Form(str, read_device)}


def _named(kind: str, name: Any) -> Any:
    if type(name) is not str or name not in _NAMED[kind]:
        raise LoadError(f"{shown(name)} is no {kind.replace('_', ' ')}")
    return _NAMED[kind][name]


def encode(value: Any) -> Any:
    """An argument tree as JSON values; SaveError for what has no form there."""
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
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
    if value is ...:
        return {"ellipsis": True}
    if kind is torch.device:
        return {"device": str(value)}
    for known, by_name in _NAMED.items():
        name = str(value).removeprefix("torch.")
        if type(by_name.get(name)) is kind:
            return {known: name}
    raise SaveError(f"A saved graph cannot hold a {kind.__name__} ({value!r:.60}).")


class ValueReader:
    """Reads what ``encode`` wrote; ``nodes`` are those before it, by name."""

    def __init__(self, nodes: Mapping[str, fx.Node], devices: Devices) -> None:
        self.nodes, self.devices = nodes, devices

    def read(self, value: Any, depth: int = 0) -> Any:
        """The argument tree; LoadError, naming the place in it, for what is none."""
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
            return self.read_list(value, depth)
        if len(value) != 1:
            raise LoadError(f"has {len(value)} fields where a value has one")
        ((name, content),) = value.items()
        if name == "node":
            return self._node(content)
        try:
            return self._tagged(name, content, depth + 1)
        except LoadError as error:
            raise error.inside(name if name.isidentifier() else "") from None

    def read_list(self, values: Any, depth: int = 0) -> list[Any]:
        """Several of them."""
        found = []
        for i, item in enumerate(expect(values, list)):
            try:
                found.append(self.read(item, depth + 1))
            except LoadError as error:
                raise error.inside(f"[{i}]") from None
        return found

    def _node(self, name: Any) -> fx.Node:
        node = self.nodes.get(name) if type(name) is str else None
        if node is None:
            raise LoadError(f"{shown(name)} is no earlier node")
        return node

    def _tagged(self, name: str, content: Any, depth: int) -> Any:
        if name in _NAMED:
            return _named(name, content)
        if name == "device":
            return self.devices.place_of(read_device(content))
        if name == "tuple":
            return tuple(self.read_list(content, depth))
        if name == "dict":
            entries = expect(content, dict).items()
            return {identifier(key): self.read(item, depth) for key, item in entries}
        if name == "slice":
            return self._slice(content, depth)
        if name == "ellipsis" and content is True:
            return ...
        raise LoadError(f"{shown(name)} is no kind of value")

    def _slice(self, content: Any, depth: int) -> slice:
        parts = self.read_list(content, depth)
        if len(parts) != 3:
            raise LoadError(f"has {len(parts)} parts, not 3")
        for part in parts:
            if not (part is None or type(part) is int or isinstance(part, fx.Node)):
                raise LoadError(f"{shown(part)} is no bound")
        return slice(*parts)
