"""The code that a graph was traced from: which modules it is in, and which names it reads.

LlamaForCausalLM, LlamaMLP, ...   ->   transformers.models.llama.modeling_llama, and the hash of
                                       its file; names {"scaling", "config", "q_proj", ...};
                                       methods that another function serves (a patched class)

A trace turns what the code read into constants of the graph. Attributes that it does not name, the
bookkeeping of from_pretrained or of a Trainer, are no part of the graph.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# Of transformers, besides the modelling files: what models are built of.
_PARTS = {"transformers.modeling_layers", "transformers.activations", "transformers.pytorch_utils"}
_NOT_MODELS = {"torch", "builtins", "liger_fx", "numpy", *sys.stdlib_module_names} - {"__main__"}
_INSTALLED = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
# What is read when a model is made or printed does not count.
_NO_FORWARD = {
    "__init__", "__repr__", "__eq__", "_init_weights", "reset_parameters", "extra_repr",
}  # fmt: skip


def is_model_code(module: str) -> bool:
    """Whether the module of this name is one that a model's author wrote."""
    package = module.partition(".")[0]
    if package == "transformers":
        return module.startswith("transformers.models.") or module in _PARTS
    return package not in _NOT_MODELS


def _is_local(module: str) -> bool:
    """Whether it is model code that is in no installed package."""
    file = str(getattr(sys.modules.get(module), "__file__", None))
    return is_model_code(module) and not file.startswith(_INSTALLED)


class ModelCode:
    """The code of some classes: of the modules that they and their bases come from, and of those
    that these name, but for installed packages.

    modules: their names. bases: the classes that are defined there. names: all that their functions
    call by name, and strings they may look something up by.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self.modules: dict[str, None] = {}
        self.names = {"forward"}
        above = dict.fromkeys(base for cls in classes for base in cls.__mro__)
        self.bases = [base for base in above if is_model_code(base.__module__)]
        for base in self.bases:
            self._read(_functions_in(vars(base)))
        self._pending = [base.__module__ for base in self.bases]
        while self._pending:
            self._read_module(self._pending.pop())
        for base in above.keys() - {object, nn.Module}:
            if base.__module__.startswith("torch.nn."):
                self._read(_functions_in(vars(base)))
            elif base not in self.bases:  # PreTrainedModel.loss_function, say
                read = {n: v for n, v in vars(base).items() if n in self.names}
                self._read(_functions_in({n: v for n, v in read.items() if type(v) is property}))
        self._starts = tuple(n for n in self.names if n.endswith("_") and not n.startswith("_"))

    def reads(self, name: str) -> bool:
        """Whether the code may read an attribute of that name; f"scale_{i}" reads all scale_."""
        return name in self.names or name.startswith(self._starts)

    def _read_module(self, name: str) -> None:
        if name in self.modules:
            return
        self.modules[name] = None
        held = vars(sys.modules.get(name, ModuleType(name)))
        own = {n: v for n, v in held.items() if getattr(v, "__module__", None) == name}
        self._read(_functions_in(own))
        for cls in own.values():
            if isinstance(cls, type) and not issubclass(cls, nn.Module):
                self._read(_functions_in(vars(cls)))
        self._pending += filter(_is_local, (_home_of(held[n]) for n in self.names & held.keys()))

    def _read(self, functions: Iterable[FunctionType]) -> None:
        for function in functions:
            self.names |= set(_names_in(function.__code__))

    def patched(self) -> dict[str, str]:
        """By "module.Class.name", the methods that are not what their class's file says: the module
        and name of the function that serves each, nothing for one that is in no file."""
        found: dict[str, str] = {}
        for base in self.bases:
            file = getattr(sys.modules.get(base.__module__), "__file__", None)
            for name, value in vars(base).items():
                key = f"{full_name(base)}.{name}"
                for function in layers_of(_function_of(value))[-1:]:
                    home, inner = home_of(function), function.__code__.co_qualname
                    written = os.path.abspath(function.__code__.co_filename)
                    if name in _NO_FORWARD or (f"{home}.{inner}", written) == (key, file):
                        continue
                    found[key] = f"{home}:{inner}" if os.path.exists(written) else ""
        return found


def full_name(cls: type) -> str:
    """A class with its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def home_of(function: FunctionType) -> str:
    """The name of the module that a function was written in, whatever decorators call it."""
    return str(function.__globals__.get("__name__", ""))


def layers_of(function: Any) -> list[FunctionType]:
    """The plain functions of a callable, from the outermost wrapper to what it wraps."""
    found: list[FunctionType] = []
    while True:
        function = getattr(function, "__func__", function)
        if isinstance(function, functools.partial):
            function = function.func
            continue
        if isinstance(function, FunctionType):
            found.append(function)
        if not hasattr(function, "__wrapped__") or len(found) > 20:
            return found
        function = function.__wrapped__


def hash_of_module(name: str) -> str:
    """The first 32 digits of the SHA-256 of the module's file as it is now; empty without one."""
    file = getattr(sys.modules.get(name), "__file__", None)
    try:
        found = os.stat(file) if isinstance(file, str) else None
    except (OSError, ValueError):
        found = None
    return _hash(str(file), (found.st_mtime_ns, found.st_size, found.st_ino)) if found else ""


@functools.lru_cache(maxsize=256)
def _hash(file: str, stamp: tuple[int, ...]) -> str:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _home_of(value: Any) -> str:
    """The module that a value is, or that it or its class comes from."""
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _function_of(value: Any) -> Any:
    if isinstance(value, functools.cached_property):
        return value.func
    return value.fget if isinstance(value, property) else value


def _functions_in(held: Any) -> Iterator[FunctionType]:
    """The functions that a class or module holds, their wrappers, and what these close over."""
    for name, value in held.items():
        for layer in layers_of(_function_of(value)) if name not in _NO_FORWARD else ():
            yield layer
            for cell in layer.__closure__ or ():
                yield from layers_of(_contents(cell))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from _strings(code.co_consts)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _names_in(const)


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for value in constants:
        if isinstance(value, str) and value.isidentifier():
            yield value
        elif isinstance(value, tuple):
            yield from _strings(value)
