"""One kind of call of a block: which inputs, of which sizes and dtypes, and which plain arguments.

   layer(<float32 2 x 7 x 64>, position_embeddings=(<2 x 7 x 16>, <2 x 7 x 16>), use_cache=False)
->
   hidden_states float32[batch, sequence, 64],
   position_embeddings (float32[batch, sequence, 16], float32[batch, sequence, 16]),
   use_cache=False

Arguments are trees: tuples, lists and dictionaries (ModelOutput among them) of tensors, plain
values and opaque Python objects such as caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from liger_fx.tracing.leaves import is_output_class
from liger_fx.tracing.numbers import TracedNumber

# Arguments that a graph is made for, one by one.
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)


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
class Constant:
    """A plain argument that the graph holds for this value only."""

    value: Any

    def __str__(self) -> str:
        return repr(self.value)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Constant)
            and type(self.value) is type(other.value)
            and repr(self.value) == repr(other.value)
        )

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True)
class Number:
    """A number that is an input of the graph: an int that is a size of that name, or one whose
    value the model's code never asked for."""

    kind: type
    size: str | None = None

    def __str__(self) -> str:
        return f"any {self.kind.__name__}" if self.size is None else f"the size {self.size}"


@dataclass(frozen=True)
class Opaque:
    """A Python object of this class, used by the graph through functions that are called."""

    cls: type

    def __str__(self) -> str:
        return f"a {self.cls.__name__}"


@dataclass(frozen=True)
class Items:
    """A tuple, list or mapping of that class; ``keys`` of a mapping in their order."""

    kind: type
    items: tuple[Spec, ...]
    keys: tuple[Any, ...] | None = None

    def places(self) -> list[tuple[Any, Spec]]:
        """Each item with the index or key under which it is found."""
        keys = range(len(self.items)) if self.keys is None else self.keys
        return list(zip(keys, self.items, strict=True))

    def __str__(self) -> str:
        if self.keys is None:
            return f"({', '.join(map(str, self.items))})"
        return "{" + ", ".join(f"{key}: {item}" for key, item in self.places()) + "}"


Spec = InputSpec | Constant | Number | Opaque | Items
LEAVES = (InputSpec, Number, Opaque)  # what becomes an input of the graph


@dataclass(frozen=True)
class CallSpec:
    """The arguments of a call by name, and example values of the varying sizes; of ``loose`` ones
    another example may do as well."""

    arguments: dict[str, Spec]
    hints: dict[str, int] = field(default_factory=dict)
    loose: frozenset[str] = frozenset()

    def describe(self) -> dict[str, str]:
        """Each argument by name, in words."""
        return {name: str(spec) for name, spec in self.arguments.items()}

    def leaves(self) -> Iterator[tuple[str, Spec]]:
        """The inputs of the graph by the names of its placeholders, in the order of the
        arguments."""
        taken = set(self.arguments)
        for name, spec in self.arguments.items():
            yield from _leaves(name, spec, taken)

    @property
    def tensors(self) -> dict[str, InputSpec]:
        """The tensors among the inputs, by the names of the placeholders."""
        return {name: spec for name, spec in self.leaves() if isinstance(spec, InputSpec)}

    @property
    def constants(self) -> dict[str, Any]:
        """The plain arguments that are given by name and hold for one value."""
        specs = self.arguments.items()
        return {name: spec.value for name, spec in specs if isinstance(spec, Constant)}


def _leaves(name: str, spec: Spec, taken: set[str]) -> Iterator[tuple[str, Spec]]:
    if isinstance(spec, Items):
        for key, item in spec.places():
            yield from _leaves(inner_name(name, key, taken), item, taken)
    elif isinstance(spec, LEAVES):
        yield name, spec


def inner_name(name: str, key: Any, taken: set[str]) -> str:
    """The name of an item of an argument, an identifier that is not taken, and from now on is."""
    found = f"{name}_{key}"
    found = found if found.isidentifier() else f"{name}_item"
    while found in taken:
        found += "_"
    taken.add(found)
    return found


def free_numbers(call: CallSpec) -> list[str]:
    """The inputs that are numbers of any value."""
    return [n for n, spec in call.leaves() if isinstance(spec, Number) and spec.size is None]


def with_numbers_free(call: CallSpec, other: CallSpec) -> CallSpec | None:
    """The call that these two are, if they differ in plain numbers given by name alone, with those
    left open; None if they differ in anything else."""
    if call.arguments.keys() != other.arguments.keys():
        return None
    found: dict[str, Spec] = {}
    for name, spec in call.arguments.items():
        theirs = other.arguments[name]
        if spec == theirs:
            found[name] = spec
            continue
        kinds = [type(s.value) for s in (spec, theirs) if isinstance(s, Constant)]
        if len(kinds) == 2 and kinds[0] is kinds[1] and kinds[0] in (int, float):
            found[name] = Number(kinds[0])
        elif isinstance(theirs, Number) and theirs.size is None and kinds == [theirs.kind]:
            found[name] = theirs
        else:
            return None
    return replace(call, arguments=found)


class UnsupportedCall(Exception):
    """An argument that a graph cannot take; its text says which."""


class Namer:
    """Names the sizes of one call's tensors; ``hints`` are example values of those sizes."""

    def __init__(self) -> None:
        self.hints: dict[str, int] = {}
        self.loose: set[str] = set()

    def sizes(self, name: str, tensor: torch.Tensor) -> tuple[int | str, ...]:
        """The sizes of the tensor whose placeholder has this name."""
        raise NotImplementedError

    def other(self, name: str, value: Any) -> Spec:
        """What stands for a value that is no tensor, no container and not plain."""
        return Opaque(type(value))

    def describe(self, arguments: Mapping[str, Any]) -> CallSpec:
        """The kind of call that these named arguments make; UnsupportedCall where no graph can
        serve it."""
        taken = set(arguments)
        specs = {name: _describe(name, value, self, taken) for name, value in arguments.items()}
        return CallSpec(specs, self.hints, frozenset(self.loose))


def _describe(name: str, value: Any, sizes_of: Namer, taken: set[str]) -> Spec:
    if isinstance(value, torch.Tensor):
        return InputSpec(sizes_of.sizes(name, value), value.dtype, value.device)
    if isinstance(value, TracedNumber):
        return Number(type(value).__mro__[1])
    if isinstance(value, PLAIN):
        return Constant(value)
    is_container = isinstance(value, (dict, tuple, list))
    if is_container and may_hold_more(type(value)) and vars(value):
        raise UnsupportedCall(f"{name}, a {type(value).__name__} with attributes of its own")
    if isinstance(value, dict):
        items = tuple(
            _describe(inner_name(name, key, taken), item, sizes_of, taken)
            for key, item in value.items()
        )
        if not all(isinstance(key, (str, int)) for key in value):
            raise UnsupportedCall(f"{name}, a mapping whose keys are no names")
        return Items(type(value), items, tuple(value))
    if isinstance(value, (tuple, list)):
        inner = tuple(
            _describe(inner_name(name, i, taken), item, sizes_of, taken)
            for i, item in enumerate(value)
        )
        return Items(type(value), inner)
    return sizes_of.other(name, value)


def may_hold_more(kind: type) -> bool:
    """Whether a container of that class can have attributes that are none of its items."""
    return kind.__dictoffset__ != 0 and not is_output_class(kind)


def is_mask(tensor: torch.Tensor) -> bool:
    """Whether it is an attention mask by its shape, (batch, 1, queries, keys): what the last two
    equal in one call, they need not in another."""
    return tensor.ndim == 4 and isinstance(tensor.shape[1], int) and tensor.shape[1] == 1


def flat_inputs(specs: Mapping[str, Spec], arguments: Mapping[str, Any]) -> list[Any]:
    """The values of the graph's inputs, in the order of ``CallSpec.leaves``."""
    return [leaf for name, spec in specs.items() for leaf in _leaves_of(spec, arguments[name])]


def _leaves_of(spec: Spec, value: Any) -> Iterator[Any]:
    if isinstance(spec, Items):
        for key, item in spec.places():
            yield from _leaves_of(item, value[key])
    elif isinstance(spec, LEAVES):
        yield value


def refuse_tensor_subclasses(arguments: Mapping[str, Any]) -> None:
    """UnsupportedCall for a tensor with a class of its own, such as a DTensor."""
    for name, value in arguments.items():
        _refuse_subclass(name, value)


def _refuse_subclass(name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and type(value) not in TENSORS:
        raise UnsupportedCall(f"{name}, a {type(value).__name__}")
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_subclass(name, item)


def with_sizes_of(call: CallSpec, arguments: Mapping[str, Any]) -> CallSpec:
    """The same call traced at the sizes of these arguments; a size of 0 or 1 holds for itself only.

    (A dimension of one is broadcast where any other is not, so a trace at one says nothing about
    others.)
    """
    hints: dict[str, int] = {}
    values = flat_inputs(call.arguments, arguments)
    for (_, spec), value in zip(call.leaves(), values, strict=True):
        if isinstance(spec, InputSpec):
            for named, size in zip(spec.sizes, value.shape, strict=True):
                if isinstance(named, str):
                    hints.setdefault(named, int(size))

    def pinned(spec: Spec) -> Spec:
        if isinstance(spec, Items):
            return replace(spec, items=tuple(map(pinned, spec.items)))
        if isinstance(spec, InputSpec):
            sizes = (hints[s] if isinstance(s, str) and hints[s] < 2 else s for s in spec.sizes)
            return replace(spec, sizes=tuple(sizes))
        return spec

    arguments = {name: pinned(spec) for name, spec in call.arguments.items()}
    return CallSpec(arguments, hints, call.loose)


@dataclass(frozen=True)
class Signature:
    """How a block is called: the parameters that may be given by position, without self; those
    that are None if they are not given; whether there is an *args."""

    positional: tuple[str, ...]
    default_none: frozenset[str]
    gathers: bool

    @classmethod
    def of(cls, forward: Any) -> Signature:
        """That of an unbound forward."""
        parameters = list(inspect.signature(forward).parameters.values())
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = [p for p in parameters if p.kind in (*by_position, inspect.Parameter.KEYWORD_ONLY)]
        return cls(
            tuple(p.name for p in parameters if p.kind in by_position)[1:],
            frozenset(p.name for p in named if p.default is None),
            any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters),
        )

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, without those that are None by default too (given or not is the
        same; in a ``**kwargs`` it is not). UnsupportedCall for more positional ones than have
        names."""
        found: dict[str, Any] = {}
        default_none = self.default_none
        if args:
            if len(args) > len(self.positional):
                count = f"{len(args)} positional argument{'s' * (len(args) > 1)}"
                why = " where forward takes *args, which has no names for them"
                raise UnsupportedCall(count + why * self.gathers)
            for name, value in zip(self.positional, args):  # noqa: B905  (there may be fewer)
                if value is not None or name not in default_none:
                    found[name] = value
        for name, value in kwargs.items():
            if value is not None or name not in default_none:
                found[name] = value
        return found


def named_arguments(
    forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """``Signature.named`` for an unbound forward."""
    return Signature.of(forward).named(args, kwargs)
