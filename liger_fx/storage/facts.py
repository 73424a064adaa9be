"""What a value says, as a text: equal texts for values that compute the same.

0.25                                      ->   "0.25"
Cfg(scale=3.0)                            ->   "net.Cfg(scale=3.0)"
partial(leaky_relu, negative_slope=0.1)   ->   "partial(torch...leaky_relu, negative_slope=0.1)"
lambda x: x * mult                        ->   "net:Net.__init__.<locals>.<lambda>(mult=5.0)"
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
from collections.abc import Container, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from liger_fx.storage.model_code import home_of, is_model_code, layers_of

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_DEEPEST, _LONGEST = 20, 80


class Indescribable(Exception):
    """A value of which no text tells what it does; the text is its type's name."""


def config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that a model computes by."""
    found = _computed_by(json.loads(config.to_json_string(use_diff=False)))
    return {**found, "experts": getattr(config, "_experts_implementation", None)}


def _computed_by(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _computed_by(value) if isinstance(value, dict) and "model_type" in value else value
        for key, value in raw.items()
        if key not in ("transformers_version", "_name_or_path", "architectures", "dtype")
    }


class Describer:
    """Texts of values; the texts of configs, which many modules share, are made once.

    modules: of the tree, by identity: they are described on their own.
    """

    def __init__(self, modules: Container[int]) -> None:
        self.modules = modules
        self._configs: dict[int, tuple[Any, str]] = {}

    def text(self, value: Any) -> str:
        """The value's text, a hash in place of a long one; Indescribable where it has none."""
        found = self._text(value, ())
        if len(found) <= _LONGEST and found.isprintable():
            return found
        return f"sha256:{hashlib.sha256(found.encode(errors='replace')).hexdigest()[:16]}"

    def _text(self, value: Any, above: tuple[int, ...]) -> str:
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if type(value) in _PLAIN:
            return repr(value)
        if isinstance(value, int | float | str):  # numpy's numbers, say
            return f"{_name(type(value))} {value}"
        if isinstance(value, PreTrainedConfig):
            return self._config(value)
        if isinstance(value, torch.Tensor):
            return _tensor(value)
        if isinstance(value, nn.Module) and id(value) in self.modules:
            return f"the {_name(type(value))} of the model"
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, BuiltinFunctionType) or type(value) is torch._ops.OpOverload:
            return torch.typename(value)
        if id(value) in above:
            return "itself"
        if len(above) > _DEEPEST:
            raise Indescribable(_name(type(value)))
        return self._made_of_parts(value, (*above, id(value)))

    def _made_of_parts(self, value: Any, above: tuple[int, ...]) -> str:
        if isinstance(value, dict):
            pairs = ((self._text(k, above), self._text(v, above)) for k, v in value.items())
            return f"{{{', '.join(sorted(f'{k}: {v}' for k, v in pairs))}}}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._text(item, above) for item in value)}]"
        if isinstance(value, set | frozenset):
            return f"{{{', '.join(sorted(self._text(item, above) for item in value))}}}"
        if isinstance(value, functools.partial):
            args = [(str(i), arg) for i, arg in enumerate(value.args)]
            given = self._fields([*args, *value.keywords.items()], above)
            return f"partial({self._text(value.func, above)}, {given})"
        if isinstance(value, MethodType):
            owner = self._text(value.__self__, above)
            return f"{self._text(value.__func__, above)} of {owner}"
        if isinstance(value, FunctionType):
            return self._function(value, above)
        if isinstance(getattr(value, "__qualname__", None), str):
            return _name(value)
        return self._object(value, above)

    def _config(self, config: PreTrainedConfig) -> str:
        if id(config) not in self._configs:
            self._configs[id(config)] = (config, repr(sorted(config_facts(config).items())))
        return self._configs[id(config)][1]

    def _function(self, function: FunctionType, above: tuple[int, ...]) -> str:
        inner = layers_of(function)[-1]
        home, name = home_of(inner), inner.__code__.co_qualname
        if not is_model_code(home):
            return f"{home}:{name}"
        cells = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
        held = [(n, cell.cell_contents) for n, cell in cells if n != "__class__"]
        return f"{home}:{name}({self._fields(held, above)})"

    def _object(self, value: Any, above: tuple[int, ...]) -> str:
        """By its fields, where all that it holds are fields of Python."""
        cls = type(value)
        slots = [n for base in cls.__mro__ for n in _slots(base) if hasattr(value, n)]
        held = {**getattr(value, "__dict__", {}), **{n: getattr(value, n) for n in slots}}
        is_python = all(map(_is_written_in_python, cls.__mro__)) and (
            held or hasattr(value, "__dict__")
        )
        if not is_python or isinstance(value, nn.Module):
            raise Indescribable(_name(cls))
        return f"{_name(cls)}({self._fields(sorted(held.items()), above)})"

    def _fields(self, held: Iterable[tuple[str, Any]], above: tuple[int, ...]) -> str:
        return ", ".join(f"{name}={self._text(value, above)}" for name, value in held)


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"


def _slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ())
    every = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in every if name not in ("__dict__", "__weakref__"))


def _is_written_in_python(cls: type) -> bool:
    # a type of C has the function that makes it, and may hold more than fields
    return cls is object or not isinstance(vars(cls).get("__new__"), BuiltinFunctionType)


def _tensor(value: torch.Tensor) -> str:
    kind = f"{value.dtype}{list(value.shape)}"
    if value.is_meta or type(value) is not torch.Tensor or value.layout is not torch.strided:
        return kind
    data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{kind} {hashlib.sha256(data.tobytes()).hexdigest()[:16]}"
