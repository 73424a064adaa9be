"""One kind of call of a model: which inputs, of which sizes and dtypes, and which plain arguments.

   model(input_ids=<int64 2 x 7>, labels=<int64 2 x 7>, use_cache=False)
->
   input_ids int64[batch, sequence], labels int64[batch, sequence], use_cache=False
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from liger_fx.errors import UsageError

# The sizes that transformers models share between inputs, by the inputs' names.
_TRANSFORMERS_SIZES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "labels": ("batch", "sequence"),
    "inputs_embeds": ("batch", "sequence", ""),
}
# Arguments that a graph is made for, one by one.
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class InputSpec:
    """A tensor input: each dimension a number, or the name of a size that may vary from call to
    call."""

    sizes: tuple[int | str, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, self.sizes))}] on {self.device}"


@dataclass(frozen=True)
class CallSpec:
    """The tensor inputs of a call by name, the plain arguments, and example values of the varying
    sizes."""

    tensors: dict[str, InputSpec]
    constants: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)

    def describe(self) -> dict[str, str]:
        """Each input by name, in words."""
        tensors = {name: str(spec) for name, spec in self.tensors.items()}
        return {**tensors, **{name: repr(value) for name, value in self.constants.items()}}


class UnsupportedCall(Exception):
    """An argument that a graph cannot take; its text says which."""


def describe_call(model: nn.Module, arguments: Mapping[str, Any]) -> CallSpec:
    """The kind of call that these keyword arguments make; UnsupportedCall where no graph can serve
    it."""
    named = is_transformers(model)
    tensors: dict[str, InputSpec] = {}
    constants: dict[str, Any] = {}
    hints: dict[str, int] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            names = _TRANSFORMERS_SIZES.get(name, ()) if named else ()
            names = names if len(names) == value.ndim else ()
            tensors[name] = _describe_input(name, value, names, hints)
        elif named and name == "is_causal":
            raise UnsupportedCall("is_causal, which rewrites the config while the call lasts")
        elif isinstance(value, PLAIN):
            constants[name] = value
        else:
            raise UnsupportedCall(f"{name}, a {type(value).__name__}")
    return CallSpec(tensors, constants, hints)


def _describe_input(
    name: str, tensor: torch.Tensor, names: tuple[str, ...], hints: dict[str, int]
) -> InputSpec:
    sizes: list[int | str] = []
    for dim, size in enumerate(tensor.shape):
        # A size of one may be a broadcast one (position_ids of all rows), so it is taken as it is,
        # except where the name of the input says what it is.
        known = names[dim] if names else f"{name}_{dim}"
        if (size == 1 and not (names and name != "position_ids")) or not known:
            sizes.append(int(size))
            continue
        sizes.append(known)
        if not names:
            hints[known] = int(size)
    return InputSpec(tuple(sizes), tensor.dtype, tensor.device)


def with_sizes_of(call: CallSpec, arguments: Mapping[str, Any]) -> CallSpec:
    """The same call traced at the sizes of these arguments; a size of 0 or 1 holds for itself only.

    (A dimension of one is broadcast where any other is not, so a trace at one says nothing about
    others.)
    """
    hints: dict[str, int] = {}
    for name, spec in call.tensors.items():
        for named, size in zip(spec.sizes, arguments[name].shape, strict=True):
            if isinstance(named, str):
                hints.setdefault(named, int(size))

    def pinned(size: int | str) -> int | str:
        return hints[size] if isinstance(size, str) and hints[size] < 2 else size

    tensors = {
        name: replace(spec, sizes=tuple(map(pinned, spec.sizes)))
        for name, spec in call.tensors.items()
    }
    return CallSpec(tensors, call.constants, hints)


def named_arguments(
    forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name, without those that are None by default too (given or not is the
    same)."""
    names, kept, gathers = _parameters(forward)
    named = {key: value for key, value in kwargs.items() if value is not None or key in kept}
    if args:
        if len(args) > len(names):
            count = f"{len(args)} positional argument{'s' * (len(args) > 1)}"
            why = " where forward takes *args, which has no names for them" if gathers else ""
            raise UnsupportedCall(count + why)
        for name, value in zip(names, args, strict=False):
            if value is not None or name in kept:
                named[name] = value
    return named


@functools.lru_cache(maxsize=256)
def _parameters(forward: Any) -> tuple[tuple[str, ...], frozenset[str], bool]:
    """Of an unbound forward: the parameters that may be given by position, without self; those to
    which None says something; whether there is an *args."""
    parameters = list(inspect.signature(forward).parameters.values())
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters if p.kind in (*by_position, inspect.Parameter.KEYWORD_ONLY)]
    return (
        tuple(p.name for p in parameters if p.kind in by_position)[1:],
        frozenset(p.name for p in named if p.default is not None),
        any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters),
    )


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers model, with a config that says how to call it."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def example_call(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...] | None) -> CallSpec:
    """The kind of call to trace first: the user's example, or token ids with their mask."""
    forward = type(model).forward
    try:
        if isinstance(inputs, Mapping):
            return describe_call(model, named_arguments(forward, (), inputs))
        if isinstance(inputs, (tuple, list)):
            return describe_call(model, named_arguments(forward, tuple(inputs), {}))
    except UnsupportedCall as unsupported:
        raise UsageError(
            f"The example inputs hold {unsupported}; a graph takes tensors and plain values."
        ) from None
    if inputs is not None:
        raise UsageError(
            "Example inputs are a tuple of positional arguments or a mapping of named ones, not "
            f"a {type(inputs).__name__}."
        )
    if not is_transformers(model):
        raise UsageError(
            f"{type(model).__name__} is no transformers model, so it needs example inputs: pass "
            "inputs=(tensor, ...) or inputs={'name': tensor, ...}."
        )
    names = set(inspect.signature(forward).parameters)
    if "input_ids" not in names:
        raise UsageError(
            f"{type(model).__name__} takes no input_ids; pass example inputs as "
            "inputs={'name': tensor, ...}."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    spec = InputSpec(("batch", "sequence"), torch.long, device)
    return CallSpec({name: spec for name in ("input_ids", "attention_mask") if name in names})
