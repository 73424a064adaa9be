"""What a saved graph may hand to the functions that look something up by name.

    model_output("transformers.modeling_outputs:CausalLMOutputWithPast", logits=...)    allowed
    model_output("os:system", ...)   cache_call(cache, "__reduce__")                     LoadError

Names that are looked up must be plain strings in the file, never what another node computed.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx
from transformers import masking_utils
from transformers.utils.generic import ModelOutput

from liger_fx.codec import shown
from liger_fx.errors import LoadError
from liger_fx.storage.targets import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    OPERATORS,
    PROPERTIES,
    SET_GRAD_ENABLED,
)
from liger_fx.tracing import leaves
from liger_fx.tracing.patches import CACHE_METHODS

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_REFERENCE = re.compile(
    r"(transformers\.modeling_outputs|transformers\.models\.\w+\.modeling_\w+):([A-Za-z]\w*)",
    re.ASCII,
)
_IMPLEMENTATION = re.compile(r"[a-z0-9_]{1,60}", re.ASCII)
_DEVICE_TYPE = re.compile(r"[a-z]{1,10}", re.ASCII)


class Reference(NamedTuple):
    """A name in a modelling file of transformers that a node looks up when it runs."""

    node: str
    text: str
    is_class: bool


def check(name: str, target: Any, args: Args, kwargs: Kwargs) -> Reference | None:
    """LoadError unless these arguments suit the function; a name that is to be resolved, if any."""
    if target in OPERATORS and (kwargs or len(args) != _arity(target)):
        raise LoadError(f"takes {_arity(target)} values, not {len(args)}", "args")
    checker = _CHECKERS.get(target)
    if checker is None:
        return None
    reference = checker(args, kwargs)
    return Reference(name, reference, target is leaves.model_output) if reference else None


@functools.cache
def _arity(operator: Any) -> int:
    return len(inspect.signature(operator).parameters)


def _check_getattr(args: Args, kwargs: Kwargs) -> None:
    _shape(args, kwargs, (fx.Node, str))
    if args[1] not in PROPERTIES:
        raise LoadError(f"reads the attribute {shown(args[1])}, which is not allowed")


def _check_attention(args: Args, kwargs: Kwargs) -> str | None:
    if not args or not isinstance(args[0], fx.Node) or args[0].op != "get_attr":
        raise LoadError("attention has no module as its first argument")
    implementation, default = kwargs.get("implementation"), kwargs.get("default")
    if implementation is not None and not _matches(_IMPLEMENTATION, implementation):
        raise LoadError(f"{shown(implementation)} is no attention implementation")
    return None if default is None else _reference(default)


def _check_build_mask(args: Args, kwargs: Kwargs) -> None:
    _shape(args, {}, (str, fx.Node))
    builder = getattr(masking_utils, args[0], None) if args[0].startswith("create_") else None
    if not (args[0].endswith("_mask") and inspect.isfunction(builder)):
        raise LoadError(f"{shown(args[0])} is no mask builder of this transformers")


def _check_new_cache(args: Args, kwargs: Kwargs) -> None:
    _shape(args, kwargs, (fx.Node if args and args[0] is not None else type(None),))


def _check_cache_call(args: Args, kwargs: Kwargs) -> None:
    _shape(args[:2], {}, (fx.Node, str))
    if args[1] not in CACHE_METHODS:
        raise LoadError(f"{shown(args[1])} is no method of a cache that a graph may call")
    if args[0].op != "placeholder" and args[0].target is not leaves.new_cache:
        raise LoadError(f"{args[0].name} is no cache")


def _check_model_output(args: Args, kwargs: Kwargs) -> str:
    _shape(args, {}, (str,))
    return _reference(args[0])


def _check_grad_mode(args: Args, kwargs: Kwargs) -> None:
    _shape(args, kwargs, (bool,))


def _check_enter_autocast(args: Args, kwargs: Kwargs) -> None:
    if kwargs or len(args) != 4 or not _matches(_DEVICE_TYPE, args[0]):
        raise LoadError("has other arguments than (device type, dtype, enabled, cache)")
    if not isinstance(args[1], torch.dtype | None):
        raise LoadError(f"{shown(args[1])} is no dtype")
    _shape(args[2:], {}, (bool, bool))


def _check_exit_autocast(args: Args, kwargs: Kwargs) -> None:
    _shape(args, kwargs, (fx.Node,))
    if args[0].target is not ENTER_AUTOCAST:
        raise LoadError(f"{args[0].name} is no autocast region")


def _shape(args: Args, kwargs: Kwargs, kinds: tuple[type, ...]) -> None:
    if kwargs or len(args) != len(kinds) or not all(map(isinstance, args, kinds)):
        given = ", ".join([*(type(a).__name__ for a in args), *kwargs])
        wanted = ", ".join(kind.__name__ for kind in kinds)
        raise LoadError(f"is called with ({given}), not with ({wanted})")


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _reference(text: Any) -> str:
    if not _matches(_REFERENCE, text):
        raise LoadError(f"{shown(text)} is nothing in a modelling file of transformers")
    return str(text)


_CHECKERS: dict[Any, Callable[[Args, Kwargs], str | None]] = {
    getattr: _check_getattr,
    leaves.attention: _check_attention,
    leaves.build_mask: _check_build_mask,
    leaves.new_cache: _check_new_cache,
    leaves.cache_call: _check_cache_call,
    leaves.model_output: _check_model_output,
    SET_GRAD_ENABLED: _check_grad_mode,
    ENTER_AUTOCAST: _check_enter_autocast,
    EXIT_AUTOCAST: _check_exit_autocast,
}


def resolve(references: Iterable[Reference], modules: set[str]) -> None:
    """LoadError unless each names an attention function or an output class in one of ``modules``.

    ``modules`` are those that the model's own classes come from; nothing is imported here.
    """
    for reference in references:
        module, _, name = reference.text.partition(":")
        known = module in modules or module == "transformers.modeling_outputs"
        found = getattr(sys.modules.get(module), name, None) if known else None
        if reference.is_class:
            fits = isinstance(found, type) and issubclass(found, ModelOutput)
        else:
            fits = isinstance(found, FunctionType) and found.__module__ == module
            fits = fits and "attention" in name
        if not fits:
            what = "output class" if reference.is_class else "attention function"
            raise LoadError(f"{shown(reference.text)} is no {what} of this model", reference.node)
