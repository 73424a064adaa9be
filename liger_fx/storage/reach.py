"""What the forward code of some modules can read: names of attributes, functions, global names.

    LlamaAttention.forward   ->   names {"scaling", "config", "layer_idx", "q_proj", ...},
                                  the functions it calls, modeling_llama.apply_rotary_pos_emb, ...

A trace turns what the code read into constants of the graph. What it cannot read, the bookkeeping
of from_pretrained or of a Trainer, is no part of the graph.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from liger_fx.modules.origin import Origin
from liger_fx.storage.model_code import codes_in, home_of, is_model_code, layers_of

# Methods of tensors and of every module: x.to(dtype) is no call of PreTrainedModel.to.
_OF_ALL = frozenset(dir(torch.Tensor)) | frozenset(dir(nn.Module)) - {"forward"}
_BASES = ("transformers.modeling_utils", "torch.nn.modules.")


class Reach:
    """Found by walking over code objects, from each forward to what it names.

    names: what the code calls attributes, and strings it may look attributes up by.
    functions: of model code, once each. methods: those of a class, by "module.Class.name".
    globals: global names that model code reads, by "module.name", and plain attributes of classes,
    by "module.Class.name". modules: of model code, of which
    it reads names. classes: of the modules, and of objects of model code that they hold.
    """

    def __init__(self, parts: Iterable[Origin]) -> None:
        self.names: set[str] = set()
        self.functions: dict[int, FunctionType] = {}
        self.methods: dict[str, FunctionType] = {}
        self.globals: dict[str, Any] = {}
        self.modules: set[str] = set()
        self.classes: dict[type, None] = {}
        self._starts_of_names: tuple[str, ...] = ()
        self._codes: set[int] = set()
        self._held: dict[str, dict[int, Any]] = defaultdict(dict)
        self._pending: list[str] = []
        for part in parts:
            self._add_class(part.cls)
            for name, value in part.attributes.items():
                if not isinstance(value, bool | int | float | str | PreTrainedConfig):
                    self._held[name][id(value)] = value
        self._add_name("forward")
        while self._pending:
            self._follow_name(self._pending.pop())

    def reads(self, name: str) -> bool:
        """Whether the code can read an attribute of that name."""
        return name in self.names or name.startswith(self._starts_of_names)

    def _add_class(self, cls: type) -> None:
        if cls not in self.classes:
            self.classes[cls] = None
            for name in list(self.names):
                self._follow_method(cls, name)

    def _add_name(self, name: str) -> None:
        if name not in self.names:
            self.names.add(name)
            self._pending.append(name)

    def _follow_name(self, name: str) -> None:
        for cls in list(self.classes):
            self._follow_method(cls, name)
        for value in list(self._held.get(name, {}).values()):
            self._follow_value(value)

    def _follow_method(self, cls: type, name: str) -> None:
        base = next((b for b in cls.__mro__ if name in vars(b)), None)
        if base is None or base in (object, nn.Module):
            return
        found = vars(base)[name]
        is_read = isinstance(found, property | functools.cached_property)
        of_model = is_model_code(base.__module__)
        if not of_model and not base.__module__.startswith(_BASES):
            return
        if not of_model and not is_read and name in _OF_ALL:
            return
        if of_model and isinstance(found, bool | int | float | str | None):
            self.globals[f"{base.__module__}.{base.__qualname__}.{name}"] = found
        for function in _functions_of(found):
            self.methods[f"{base.__module__}.{base.__qualname__}.{name}"] = function
            self._follow(function)

    def _follow_value(self, value: Any) -> None:
        """What an attribute or a global name holds, where it is code or an object of model code."""
        if isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                self._follow_value(item)
        elif isinstance(value, FunctionType | MethodType):
            self._follow(value)
        elif isinstance(value, dict):
            for item in value.values():
                self._follow_value(item)
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow_value(item)
        elif isinstance(value, type):
            if is_model_code(value.__module__) and not issubclass(value, nn.Module):
                self._add_class(value)
        elif is_model_code(type(value).__module__) and not isinstance(
            value, nn.Module | PreTrainedConfig
        ):
            self._add_class(type(value))
            self._add_name("__call__")

    def _follow(self, function: Any) -> None:
        for layer in layers_of(function):
            if id(layer) in self._codes:
                continue
            self._codes.add(id(layer))
            self.functions[id(layer)] = layer
            self._read(layer.__code__)
            for cell in layer.__closure__ or ():
                held = _contents(cell)
                if isinstance(held, FunctionType):
                    self._follow(held)
                elif is_model_code(home_of(layer)):
                    self._follow_value(held)
            if is_model_code(home_of(layer)):
                self._read_globals(layer)

    def _read(self, code: CodeType) -> None:
        for each in codes_in(code):
            for name in (*each.co_names, *_strings(each.co_consts)):
                self._add_name(name)
                if name.endswith("_") and not name.startswith("_"):  # f"scale_{i}"
                    self._starts_of_names += (name,)

    def _read_globals(self, function: FunctionType) -> None:
        names = {name for code in codes_in(function.__code__) for name in code.co_names}
        self._read_module(home_of(function), function.__globals__, names)

    def _read_module(self, home: str, scope: dict[str, Any], names: set[str]) -> None:
        for name in names & scope.keys():
            key, value = f"{home}.{name}", scope[name]
            if key in self.globals and not isinstance(value, ModuleType):
                continue
            self.globals[key] = value
            if isinstance(value, ModuleType):
                inner = value.__name__
                if is_model_code(inner) and inner != home and inner in sys.modules:
                    self.modules.add(inner)
                    self._read_module(inner, vars(value), names)
            elif isinstance(value, FunctionType):
                if any(is_model_code(home_of(layer)) for layer in layers_of(value)):
                    self._follow(value)
            else:
                self._follow_value(value)


def _functions_of(found: Any) -> Iterator[FunctionType]:
    inner = [found]
    if isinstance(found, property):
        inner = [found.fget]
    elif isinstance(found, functools.cached_property):
        inner = [found.func]
    yield from (layers[0] for item in inner if (layers := layers_of(item)))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for value in constants:
        if isinstance(value, str) and value.isidentifier():
            yield value
        elif isinstance(value, tuple):
            yield from _strings(value)
