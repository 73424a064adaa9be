"""Where code comes from, and whether what runs is what its file says.

LlamaMLP.forward            ->  transformers.models.llama.modeling_llama, a file, its hash
LlamaMLP.forward = other    ->  another module, or a function that is in no file
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

# Of transformers, besides the modelling files: what models are built of.
_PARTS = {"transformers.modeling_layers", "transformers.activations", "transformers.pytorch_utils"}
_NOT_MODELS = {"torch", "builtins", "liger_fx", "numpy", *sys.stdlib_module_names} - {"__main__"}


def is_model_code(module: str) -> bool:
    """Whether the module of this name is one that a model's author wrote."""
    package = module.partition(".")[0]
    if package == "transformers":
        return module.startswith("transformers.models.") or module in _PARTS
    return package not in _NOT_MODELS


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


def hash_of_module(name: str) -> str | None:
    """Of the text of a module's file; None where there is none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    lines = lines_of(file) if isinstance(file, str) else ()
    return hash_of(lines) if lines else None


def lines_of(file: str) -> tuple[str, ...]:
    """The lines of a source file as it is now, none where it cannot be read."""
    stamp = _stamp(file)
    return _lines(file, stamp) if stamp else ()


def _stamp(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@functools.lru_cache(maxsize=256)
def _lines(file: str, stamp: tuple[int, ...]) -> tuple[str, ...]:
    try:
        return tuple(Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return ()


def hash_of(lines: Iterable[str]) -> str:
    """The first 32 digits of the lines' SHA-256."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def text_of(function: FunctionType) -> str | None:
    """The hash of a function's own lines; None where it is in no file."""
    code = function.__code__
    lines = lines_of(code.co_filename)[code.co_firstlineno - 1 : _last_line(code)]
    return hash_of(lines) if lines else None


def _last_line(code: CodeType) -> int:
    inner = (_last_line(const) for const in code.co_consts if isinstance(const, CodeType))
    return max([code.co_firstlineno, *(line for *_, line in code.co_lines() if line), *inner])


def is_as_written(function: FunctionType) -> bool:
    """Whether the function is, instruction by instruction, one of its module's file as that is now.

    Taken for granted where the module was not imported from a plain source file.
    """
    name = home_of(function)
    module = sys.modules.get(name)
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    file = getattr(module, "__file__", None)
    stamp = _stamp(file) if isinstance(file, str) else None
    if type(loader) is not importlib.machinery.SourceFileLoader or stamp is None:
        return bool(lines_of(function.__code__.co_filename))
    return function.__code__ in _written(loader, name, stamp)


@functools.lru_cache(maxsize=64)
def _written(loader: Any, name: str, stamp: tuple[int, ...]) -> frozenset[CodeType]:
    try:
        whole = loader.get_code(name)
    except (ImportError, SyntaxError, OSError):
        return frozenset()
    return frozenset(codes_in(whole))


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """The code and all code inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes_in(const)


def hash_of_running(function: FunctionType) -> str:
    """Of a function's instructions, names and constants: what there is where no file tells."""
    parts = [
        (code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, CodeType)])
        for code in codes_in(function.__code__)
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
