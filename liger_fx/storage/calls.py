"""A kind of call and what a graph assumes of it, as records and back.

   hidden_states float32[batch, sequence, 64], use_cache=True, past_key_values a DynamicCache
<->
   {"hidden_states": {"tensor": {"sizes": ["batch", "sequence", 64], ...}},
    "use_cache": {"value": true}, "past_key_values": {"object": "DynamicCache"}}

Classes are looked up among the caches and output classes of transformers; nothing is imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import cache_utils

from liger_fx.codec import decode, encode, expect, inside, shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage import expressions, values
from liger_fx.storage.checks import module_path
from liger_fx.storage.records import GuardsRecord, InputRecord, ReadRecord, size_name
from liger_fx.storage.values import FORMS, Devices, ValueReader, read_device
from liger_fx.tracing import leaves
from liger_fx.tracing.call import PLAIN, CallSpec, Constant, InputSpec, Items, Number, Opaque, Spec
from liger_fx.tracing.guards import MODES, Attribute, Guards, Read, TensorFacts

_MAX_DEPTH, _MAX_ITEMS, _MAX_SPECS = 8, 512, 4096
_CONTAINERS = {kind.__name__: kind for kind in (tuple, list, dict)}
_TENSORS = {kind.__name__: kind for kind in (torch.Tensor, nn.Parameter, nn.Buffer)}
_NUMBERS = {kind.__name__: kind for kind in (int, float)}
# What a check may ask of a cache.
_ATTRIBUTES = {
    "is_compileable", "is_initialized", "is_updated", "is_croppable", "layers", "keys", "values",
    "self_attention_cache", "cross_attention_cache", "is_sliding",
}  # fmt: skip
_DEFAULT_DTYPE = "get_default_dtype"
_METHODS = {
    "get_seq_length", "get_max_length", "get_max_cache_shape", "get_query_offset",
    "has_previous_state", "get", "is_recording_past", "__len__", "__contains__",
}  # fmt: skip


def guards_record(guards: Guards) -> GuardsRecord:
    """SaveError for an argument that has no form in a file."""
    call = guards.call
    return GuardsRecord(
        arguments={name: _write_spec(spec) for name, spec in call.arguments.items()},
        hints=call.hints,
        loose=sorted(call.loose),
        sizes=list(guards.sizes),
        training=guards.training,
        grad_enabled=guards.grad_enabled,
        autocast=guards.autocast,
        attention_fixed=guards.attention_fixed,
        attributes=guards.attributes,
        reads=list(map(_read_record, guards.reads)),
        numbers={name: _read_record(read) for name, read in guards.numbers.items()},
        other_mode=list(guards.other_mode),
        contiguous=guards.contiguous,
        plain=guards.plain,
        order=list(guards.order),
        distinct=guards.distinct,
        default_dtype=guards.modes.get(_DEFAULT_DTYPE),
        modes={name: value for name, value in guards.modes.items() if name != _DEFAULT_DTYPE},
        shapes={path: list(shape) for path, shape in guards.tensors.shapes.items()},
        dtypes=guards.tensors.dtypes,
        trained=guards.tensors.trained,
        layouts={
            path: None if at is None else (list(at[0]), at[1])
            for path, at in guards.tensors.layouts.items()
        },
        classes={path: _class_name(path, cls) for path, cls in guards.tensors.classes.items()},
    )


def _class_name(path: str, cls: type) -> Any:
    if _TENSORS.get(cls.__name__) is not cls:
        raise SaveError(f"A saved graph cannot ask whether {path} is a {cls.__name__}.")
    return cls.__name__


def _write_spec(spec: Spec) -> Any:
    if isinstance(spec, InputSpec):
        return {"tensor": encode(InputRecord(list(spec.sizes), spec.dtype, spec.device), FORMS)}
    if isinstance(spec, Constant):
        return {"value": values.encode(spec.value)}
    if isinstance(spec, Number):
        return {"number": [spec.kind.__name__, spec.size]}
    if isinstance(spec, Opaque):
        if getattr(cache_utils, spec.cls.__name__, None) is not spec.cls:
            raise SaveError(f"A saved graph cannot take a {spec.cls.__name__} as argument.")
        return {"object": spec.cls.__name__}
    kind = spec.kind.__name__
    if _CONTAINERS.get(kind) is not spec.kind:
        if not leaves.is_output_class(spec.kind):
            raise SaveError(f"A saved graph cannot take a {kind} as argument.")
        kind = f"{spec.kind.__module__}:{kind}"
    keys = None if spec.keys is None else list(spec.keys)
    return {"items": [kind, keys, [_write_spec(item) for item in spec.items]]}


def _read_record(read: Read) -> ReadRecord:
    steps = [
        [{"own": part.path} if isinstance(part, Attribute) else part for part in step]
        for step in read.steps
    ]
    if not isinstance(read.value, (bool, int, str, type(None))):
        raise SaveError(f"A saved graph cannot hold what its code asked of {read.argument}.")
    return ReadRecord(read.argument, steps, read.value)


# -- reading ---------------------------------------------------------------------------------------


def read_guards(record: GuardsRecord, devices: Devices) -> Guards:
    """LoadError, naming the field, for what is no assumption of a graph. Whether the block holds
    the ints that it is asked for (``own_numbers``) is not known here."""
    reader = _SpecReader(devices)
    arguments = {}
    for name, spec in record.arguments.items():
        with inside(f"arguments.{name}"):
            arguments[name] = reader.read(spec, 0)
    call = CallSpec(arguments, record.hints, frozenset(record.loose))
    leaves = [name for name, _ in call.leaves()]
    if len(set(leaves)) != len(leaves):
        raise LoadError("two inputs have one name", "arguments")
    for size, hint in record.hints.items():
        if size not in reader.sizes or hint < 0:
            raise LoadError(f"{shown(size)}: {shown(hint)} is no example of a size", "hints")
    for size in record.loose:
        if size not in record.hints:
            raise LoadError(f"{shown(size)} has no example", "loose")
    opaque = {name for name, spec in call.leaves() if isinstance(spec, Opaque)}
    with inside("reads"):
        reads = tuple(_read(read, opaque) for read in record.reads)
    with inside("numbers"):
        numbers = {n: _read(read, opaque) for n, read in record.numbers.items()}
    for name in (*record.attributes, *numbers):
        size_name(name)
    names = reader.sizes | record.attributes.keys() | numbers.keys()
    if len(names) != len(reader.sizes) + len(record.attributes) + len(numbers):
        raise LoadError("a name stands for two things", "attributes")
    for i, guard in enumerate(record.sizes):
        with inside(f"sizes[{i}]"):
            expressions.check(guard, names)
    return Guards(
        call=call,
        sizes=tuple(record.sizes),
        training=record.training,
        grad_enabled=record.grad_enabled,
        autocast=_read_autocast(record.autocast, devices),
        attention_fixed=record.attention_fixed,
        attributes=dict(record.attributes),
        reads=reads,
        numbers=numbers,
        other_mode=tuple(record.other_mode),
        contiguous=record.contiguous,
        plain=record.plain,
        order=tuple(record.order),
        distinct=record.distinct,
        modes=_read_modes(record),
        tensors=TensorFacts(
            {path: tuple(shape) for path, shape in record.shapes.items()},
            dict(record.dtypes),
            dict(record.trained),
            {
                path: None if at is None else (tuple(at[0]), at[1])
                for path, at in record.layouts.items()
            },
            {path: _TENSORS[name] for path, name in record.classes.items()},
        ),
    )


def _read_modes(record: GuardsRecord) -> dict[str, Any]:
    for name in record.modes:
        if name not in MODES or name == _DEFAULT_DTYPE:
            raise LoadError(f"{shown(name)} is no mode", "modes")
    default = record.default_dtype
    return {**record.modes, **({} if default is None else {_DEFAULT_DTYPE: default})}


class _SpecReader:
    """Reads the specifications of one call; ``sizes`` are the names that it met."""

    def __init__(self, devices: Devices) -> None:
        self.devices, self.sizes, self.count = devices, set[str](), 0
        self.values = ValueReader({}, devices)

    def read(self, record: Any, depth: int) -> Spec:
        """One argument, or one item of it."""
        self.count += 1
        if self.count > _MAX_SPECS:
            raise LoadError(f"are more than {_MAX_SPECS}")
        if depth > _MAX_DEPTH:
            raise LoadError("is nested too deeply")
        if type(record) is not dict or len(record) != 1:
            raise LoadError("is no argument of a call")
        ((kind, content),) = record.items()
        readers = {
            "tensor": self._tensor, "value": self._value, "number": self._number,
            "object": self._object,
        }  # fmt: skip
        with inside(kind if kind in readers or kind == "items" else ""):
            if kind == "items":
                return self._items(content, depth)
            if kind not in readers:
                raise LoadError(f"{shown(kind)} is no kind of argument")
            found: Spec = readers[kind](content)  # type: ignore[assignment]
            return found

    def _tensor(self, content: Any) -> InputSpec:
        found: InputRecord = decode(InputRecord, content, FORMS)
        self.sizes |= {size for size in found.sizes if isinstance(size, str)}
        device = self.devices.place_of(found.device)
        return InputSpec(tuple(found.sizes), found.dtype, device)

    def _value(self, content: Any) -> Constant:
        value = self.values.read(content)
        if not isinstance(value, PLAIN):
            raise LoadError(f"{shown(content)} is no plain argument of a call")
        return Constant(value)

    def _number(self, content: Any) -> Number:
        name, size = decode(tuple[str, str | None], content)
        if name not in _NUMBERS or (size is not None and name != "int"):
            raise LoadError(f"{shown(name)} is no kind of number")
        if size is not None:
            self.sizes.add(size_name(size))
        return Number(_NUMBERS[name], size)

    def _object(self, content: Any) -> Opaque:
        name = expect(content, str)
        found = vars(cache_utils).get(name)
        if not (isinstance(found, type) and issubclass(found, cache_utils.Cache)):
            raise LoadError(f"{shown(name)} is no cache of this transformers")
        return Opaque(found)

    def _items(self, content: Any, depth: int) -> Items:
        name, keys, items = decode(tuple[str, list[Any] | None, list[Any]], content)
        kind = _CONTAINERS.get(name) or _output_class(name)
        if (keys is None) != (kind in (tuple, list)) or len(items) > _MAX_ITEMS:
            raise LoadError(f"are no items of a {shown(name)}")
        if keys is not None and (len(keys) != len(items) or len(set(map(_key, keys))) != len(keys)):
            raise LoadError("has other keys than items")
        found = []
        for i, item in enumerate(items):
            with inside(f"[{i}]"):
                found.append(self.read(item, depth + 1))
        return Items(kind, tuple(found), None if keys is None else tuple(keys))


def _key(key: Any) -> Any:
    if type(key) not in (str, int) or (isinstance(key, str) and len(key) > 200):
        raise LoadError(f"{shown(key)} is no key")
    return key


def _output_class(reference: str) -> type:
    module, _, name = reference.partition(":")
    home = sys.modules.get(module) if module.startswith("transformers.") else None
    found: Any = vars(home).get(name) if home is not None else None
    if not leaves.is_output_class(found):
        raise LoadError(f"{shown(reference)} is no output class of transformers")
    kind: type = found
    return kind


def own_numbers(guards: Guards) -> set[str]:
    """The paths of the ints that the check of a call reads from the block."""
    asked = (*guards.reads, *guards.numbers.values())
    parts = (part for read in asked for step in read.steps for part in step)
    return {*guards.attributes.values(), *(p.path for p in parts if isinstance(p, Attribute))}


def _read(record: ReadRecord, opaque: set[str]) -> Read:
    if record.argument not in opaque:
        raise LoadError(f"{shown(record.argument)} is no object that is handed in")
    if not 1 <= len(record.steps) <= _MAX_DEPTH:
        raise LoadError("asks in too many steps")
    return Read(record.argument, tuple(tuple(_step(s)) for s in record.steps), record.value)


def _step(step: list[Any]) -> Iterator[Any]:
    kind, *parts = step or [None]
    known = {"attr": _ATTRIBUTES, "call": _METHODS}.get(kind) if isinstance(kind, str) else None
    if kind == "item" and len(parts) == 1:
        yield kind
    elif known is not None and parts and type(parts[0]) is str and parts[0] in known:
        if kind == "attr" and len(parts) > 1 or len(parts) > 4:
            raise LoadError(f"{shown(step)} is no question to a cache")
        yield from (kind, parts.pop(0))
    else:
        raise LoadError(f"{shown(step)} is no question to a cache")
    for part in parts:
        if type(part) is dict:
            if part.keys() != {"own"}:
                raise LoadError(f"{shown(part)} is no argument of a question")
            yield Attribute(module_path(expect(part["own"], str)))
        elif type(part) in (int, bool, str, type(None)):
            yield part
        else:
            raise LoadError(f"{shown(part)} is no argument of a question")


def _read_autocast(record: dict[str, Any], devices: Devices) -> dict[str, Any]:
    with inside("autocast"):
        for kind in record:
            if ":" in kind or read_device(kind).type == "meta":
                raise LoadError(f"{shown(kind)} is no type of device")
    return {
        devices.type_for("meta" if devices.from_meta else kind): dtype
        for kind, dtype in record.items()
    }


def check_arguments(guards: Guards, forward: Any) -> None:
    """LoadError for an argument that the block's ``forward`` does not take."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters}
    for name in guards.call.arguments:
        if name not in known:
            raise LoadError(f"the model's forward takes no {shown(name)}", "guards.arguments")
