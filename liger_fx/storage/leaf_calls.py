"""What a saved graph may hand to the functions that look something up by name.

    model_output("transformers.modeling_outputs:CausalLMOutputWithPast", logits=...)    allowed
    model_output("os:system", ...)   cache_call(cache, "__reduce__")                     LoadError

Names that are looked up must be plain strings in the file, never what another node computed.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Annotated, Any, NamedTuple, get_args

import torch
from torch import fx

from liger_fx.codec import Form, decode, inside, shown
from liger_fx.errors import LoadError
from liger_fx.storage.records import ImplementationName, matching
from liger_fx.storage.targets import (
    CACHE_PARTS,
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    OPERATORS,
    PROPERTIES,
    SET_GRAD_ENABLED,
)
from liger_fx.tracing import leaves
from liger_fx.tracing.leaves import CACHE_METHODS, MASK_BUILDERS

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class Reference(NamedTuple):
    """A name in a modelling file of transformers that a node looks up when it runs."""

    node: str
    text: str
    is_class: bool


def _of_type(kind: type, what: str) -> Form:
    """Arguments are read already: they only have to be of the type."""

    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise LoadError(f"is {shown(value)}, not {what}")
        return value

    return Form(str, read)


def _in(names: Iterable[str], what: str) -> Callable[[str], str]:
    known = frozenset(names)

    def check(name: str) -> str:
        if name not in known:
            raise LoadError(f"{shown(name)} is no {what}")
        return name

    return check


def _mask_builder(name: str) -> str:
    if name not in MASK_BUILDERS:
        raise LoadError(f"{shown(name)} is no mask builder of this transformers")
    return name


def _exception(reference: str) -> str:
    module, _, name = reference.partition(":")
    kind = getattr(builtins, name, None) if module == "builtins" else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise LoadError(f"{shown(reference)} is no exception of Python's own")
    return reference


def _module(node: fx.Node) -> fx.Node:
    if node.op != "get_attr":
        raise LoadError(f"{node.name} is no module")
    return node


def _cache(node: fx.Node) -> fx.Node:
    if node.op != "placeholder" and node.target not in _MAKING_CACHES:
        raise LoadError(f"{node.name} is no cache")
    return node


_MAKING_CACHES = (leaves.new_cache, leaves.encoder_decoder_cache, getattr, operator.getitem)


def _region(node: fx.Node) -> fx.Node:
    if node.target is not ENTER_AUTOCAST:
        raise LoadError(f"{node.name} is no autocast region")
    return node


_FORMS = {fx.Node: _of_type(fx.Node, "a node"), torch.dtype: _of_type(torch.dtype, "a dtype")}
_ReferenceText = Annotated[
    str,
    matching(
        r"(transformers\.modeling_outputs|transformers\.models\.\w+\.modeling_\w+):([A-Za-z]\w*)",
        "name in a modelling file of transformers",
    ),
]
# What each function is called with, by position, and whether it takes more by name or position.
_ARGUMENTS: dict[Any, tuple[Any, bool, bool]] = {
    getattr: (
        tuple[fx.Node, Annotated[str, _in(PROPERTIES | CACHE_PARTS, "attribute to read")]],
        False,
        False,
    ),
    leaves.attention: (tuple[Annotated[fx.Node, _module]], True, True),
    leaves.build_mask: (tuple[Annotated[str, _mask_builder], fx.Node], True, False),
    leaves.new_cache: (tuple[fx.Node | None], True, False),
    leaves.encoder_decoder_cache: (
        tuple[Annotated[fx.Node, _cache], Annotated[fx.Node, _cache]],
        False,
        False,
    ),
    leaves.cache_call: (
        tuple[Annotated[fx.Node, _cache], Annotated[str, _in(CACHE_METHODS, "method of a cache")]],
        True,
        True,
    ),
    leaves.model_output: (tuple[_ReferenceText], True, False),
    leaves.check: (tuple[fx.Node, Annotated[str, _exception], str | None], False, False),
    leaves.check_result: (tuple[fx.Node, str, torch.dtype, list[Any]], False, False),
    SET_GRAD_ENABLED: (tuple[bool], False, False),
    ENTER_AUTOCAST: (
        tuple[Annotated[str, matching("[a-z]{1,10}", "device")], torch.dtype | None, bool, bool],
        False,
        False,
    ),
    EXIT_AUTOCAST: (tuple[Annotated[fx.Node, _region]], False, False),
}


def check(name: str, target: Any, args: Args, kwargs: Kwargs) -> Reference | None:
    """LoadError unless these arguments suit the function; a name that is to be resolved, if any."""
    if target in OPERATORS and (kwargs or len(args) != _arity(target)):
        raise LoadError(f"takes {_arity(target)} values, not {len(args)}", "args")
    if target not in _ARGUMENTS:
        return None
    kind, more_by_name, more_by_position = _ARGUMENTS[target]
    if kwargs and not more_by_name:
        raise LoadError("is called with none", "kwargs")
    with inside("args"):
        decode(kind, list(args[: len(get_args(kind))] if more_by_position else args), _FORMS)
    if target is leaves.new_cache and any(key.startswith("_") for key in kwargs):
        raise LoadError("changes what is a config's own", "kwargs")
    if target is leaves.model_output:
        return Reference(name, args[0], True)
    if target is not leaves.attention:
        return None
    with inside("kwargs.implementation"):
        decode(ImplementationName | None, kwargs.get("implementation"))
    with inside("kwargs.default"):
        default = decode(_ReferenceText | None, kwargs.get("default"))
    return Reference(name, default, False) if default is not None else None


@functools.cache
def _arity(operator: Any) -> int:
    return len(inspect.signature(operator).parameters)


def resolve(references: Iterable[Reference], modules: set[str]) -> None:
    """LoadError unless each names an attention function or an output class in one of ``modules``.

    ``modules`` are those that the model's own classes come from: a class may come from another of
    the same package. Nothing is imported here.
    """
    packages = {"transformers", *(module.partition(".")[0] for module in modules)}
    for reference in references:
        module, _, name = reference.text.partition(":")
        known = module in modules
        known |= reference.is_class and module.partition(".")[0] in packages
        found = getattr(sys.modules.get(module), name, None) if known else None
        if reference.is_class:
            fits = leaves.is_output_class(found)
        else:
            fits = isinstance(found, FunctionType) and found.__module__ == module
            fits = fits and "attention" in name
        if not fits:
            what = "output class" if reference.is_class else "attention function"
            raise LoadError(f"{shown(reference.text)} is no {what} of this model", reference.node)
