"""A block inside the one that is traced: a call_module node, its result known from its own trace.

    for layer in self.layers: h = layer(h, attention_mask=mask, position_embeddings=(cos, sin))
 ->
    layers_0 = self.layers.0(h, attention_mask = mask, position_embeddings = (cos, sin))
    layers_1 = self.layers.1(layers_0, ...)

A block that was not traced for such a call yet stops the trace (``NeedsPlan``); once it is, the
trace starts again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils._sympy.interp import sympy_interp
from transformers.utils import output_capturing

from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.call import (
    CallSpec,
    Constant,
    Items,
    Namer,
    Number,
    Opaque,
    Spec,
    free_numbers,
    is_mask,
)
from liger_fx.tracing.containers import is_data_object
from liger_fx.tracing.fakes import FakeWorld, Question, as_expr
from liger_fx.tracing.numbers import TracedNumber, plain
from liger_fx.tracing.sizes import SizeArithmetic
from liger_fx.tracing.stand_ins import origin_of
from liger_fx.tracing.trace import Result, ResultSize, ResultTensor
from liger_fx.tracing.tree_state import is_capturing


class NeedsPlan(BaseException):
    """The trace met a call of a block inside that has no graph yet. (No Exception: the model's own
    code must not catch it.)"""

    def __init__(self, block: nn.Module, call: CallSpec, examples: dict[str, Any]) -> None:
        super().__init__(type(block).__name__)
        self.block: Any = block
        self.call, self.examples = call, examples


class NoPlan(Exception):
    """A block inside can have no graph for its call; ``cause`` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class NeedsInside(BaseException):
    """What the model wants to see happens inside a block: the trace must go through it."""


def is_block(module: nn.Module) -> bool:
    """Whether the module is a block with graphs of its own."""
    return isinstance(module, fx.GraphModule) and hasattr(type(module), "block_class")


class InnerNames(Namer):
    """Names for the sizes of a call that a trace makes: those of the outer call where they are its
    sizes."""

    def __init__(self, world: FakeWorld) -> None:
        super().__init__()
        self.world = world
        self.symbols: dict[str, Any] = {}
        self._known: dict[Any, str] = {}
        for name, size in world.symbols.items():
            self._known.setdefault(size.node.expr, name)

    def sizes(self, name: str, tensor: torch.Tensor) -> tuple[int | str, ...]:
        """A name for each size that is no number; the queries and keys of a mask get their own."""
        first_own = 2 if is_mask(tensor) else tensor.ndim
        return tuple(
            self._name(f"{name}_{dim}", size, own=dim >= first_own)
            for dim, size in enumerate(tensor.shape)
        )

    def _name(self, name: str, size: Any, *, own: bool = False) -> int | str:
        expr = as_expr(size)
        if isinstance(expr, int):
            return expr
        if size.node.hint is None:
            raise CannotRecord(f"a block inside is given {name}, a size that only the data tell")
        if own:
            self.loose.add(name)
        else:
            name = self._known.setdefault(expr, name)
        self.symbols[name] = size
        self.hints[name] = self.world.hint(size)
        return name

    def other(self, name: str, value: Any) -> Spec:
        """Sizes are numbers; a stand-in is what it stands for."""
        if isinstance(value, torch.SymInt):
            named = self._name(name, value)
            return Constant(named) if isinstance(named, int) else Number(int, named)
        return Opaque(type(example_of(value)))


def example_of(value: Any) -> Any:
    """The real object behind a stand-in, the number behind an open one; else the object itself."""
    if isinstance(value, TracedNumber):
        return plain(value)
    origin = origin_of(value)
    return value if origin is None else origin.example


def examples_of(call: CallSpec, values: list[Any]) -> dict[str, Any]:
    """The opaque inputs, and the numbers of any value, by name."""
    wanted = {name for name, spec in call.leaves() if isinstance(spec, Opaque)}
    wanted.update(free_numbers(call))
    named = zip(call.leaves(), values, strict=True)
    return {name: example_of(value) for (name, _), value in named if name in wanted}


def changed_by_call(values: list[Any]) -> None:
    """Note that a call may have changed the objects it was given."""
    for value in values:
        origin = origin_of(value)
        if origin is not None:
            origin.change()


@dataclass(frozen=True)
class ResultObject:
    """An object that the block's graph makes (a cache), and one like it to answer questions."""

    example: Any


@dataclass(frozen=True)
class NoPart:
    """An object of a dataclass, which is made when the graph runs: no trace of another block can
    look into it."""

    kind: type


@dataclass(frozen=True)
class ResultArgument:
    """An opaque argument that comes back."""

    name: str


# -- results ---------------------------------------------------------------------------------------


def describe_result(value: Any, world: FakeWorld, decisive: Iterable[Question]) -> Result:
    """What a trace returned, in terms of the sizes of its call; ``decisive`` are the questions
    whose answers decide what it is made of."""
    names: dict[sympy.Symbol, str] = {}
    for own in (True, False):  # a size's own name first, then that of a size tied to it
        for name, size in world.symbols.items():
            names.setdefault(size.node._expr if own else size.node.expr, name)
    assumes = tuple(dict.fromkeys(question.fact for question in decisive))
    return Result(_describe(value, world), names, assumes)


def _describe(value: Any, world: FakeWorld) -> Any:
    if isinstance(value, torch.Tensor):
        strides = tuple(map(as_expr, value.stride())) if value.layout is torch.strided else ()
        return ResultTensor(world.metadata(value).spec, strides)
    if isinstance(value, torch.SymInt):
        return ResultSize(value.node.expr)
    if isinstance(value, dict):
        return Items(type(value), tuple(_describe(v, world) for v in value.values()), tuple(value))
    if isinstance(value, (tuple, list)):
        return Items(type(value), tuple(_describe(v, world) for v in value))
    origin = origin_of(value)
    if origin is None:
        return NoPart(type(value)) if is_data_object(value) else Constant(value)
    if origin.argument is None:
        return ResultObject(origin.example)
    if origin.steps:
        raise CannotRecord(f"a part of {origin.argument} is returned")
    return ResultArgument(origin.argument)


class Results:
    """Makes the fakes that an inner block's result is in the trace of the outer one."""

    def __init__(
        self,
        world: FakeWorld,
        result: Result,
        symbols: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ) -> None:
        self.world, self.result, self.symbols, self.inputs = world, result, symbols, inputs
        self._fresh: dict[sympy.Symbol, Any] = {}

    def make(self) -> Any:
        """The result's tree, its tensors without nodes yet. What it assumes of sizes is asked of
        those of this trace; CannotRecord where it does not hold."""
        for fact in self.result.assumes:
            if not self._size(fact):
                raise CannotRecord("the graph of a block inside holds for other sizes than these")
        return self._make(self.result.tree)

    def _make(self, spec: Any) -> Any:
        if isinstance(spec, ResultTensor):
            shape, strides = map(self._size, spec.spec.shape), map(self._size, spec.strides)
            return self.world.empty(tuple(shape), tuple(strides), spec.spec.dtype, spec.spec.device)
        if isinstance(spec, ResultSize):
            return self._size(spec.expr)
        if isinstance(spec, Constant):
            return spec.value
        if isinstance(spec, Items):
            return rebuilt(spec.kind, spec.keys, [self._make(item) for item in spec.items])
        if isinstance(spec, NoPart):
            raise CannotRecord(f"a block inside returns a {spec.kind.__name__}")
        return self.inputs[spec.name] if isinstance(spec, ResultArgument) else spec

    def _size(self, expr: Any) -> Any:
        if isinstance(expr, int) or expr.is_number:
            return int(expr)
        if expr.is_Symbol:
            return self._symbol(expr)
        known = {symbol: self._symbol(symbol) for symbol in expr.free_symbols}
        return sympy_interp(SizeArithmetic, known, expr)

    def _symbol(self, symbol: sympy.Symbol) -> Any:
        name = self.result.names.get(symbol)
        if name is not None and name in self.symbols:
            return self.symbols[name]
        if symbol not in self._fresh:
            self._fresh[symbol] = self.world.fresh_size(7)
        return self._fresh[symbol]


def rebuilt(kind: type, keys: tuple[Any, ...] | None, items: list[Any]) -> Any:
    """A container of that class with these items."""
    if keys is None:
        return kind._make(items) if hasattr(kind, "_make") else kind(items)
    fields = dict(zip(keys, items, strict=True))
    if kind is dict:
        return fields
    try:
        return kind(**fields)
    except TypeError:
        return kind(fields)


# -- what transformers collects by hooks -----------------------------------------------------------


def collected() -> Mapping[str, Any]:
    """What a model that runs at the moment collects by its hooks: hidden_states, attentions."""
    found: Mapping[str, Any] | None = output_capturing._active_collector.get()
    return found or {}


def collected_in_compile() -> tuple[str, ...]:
    """The names of what is collected, in code that Dynamo follows: it cannot ask a context
    variable, for which transformers then uses a global one."""
    collector = output_capturing._active_collector
    return tuple(collector.global_var or ()) if collector.compiling else ()


def collects_inside(block: nn.Module, keys: Collection[str] | None) -> bool:
    """Whether a hook on a module inside the block collects something of that name; of any, if none
    are given."""
    return any(
        keys is None or _key(hook) in keys
        for module in block.modules()
        if module is not block
        for hook in module._forward_hooks.values()
        if is_capturing(hook)
    )


def _key(hook: Any) -> Any:
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return cells["key"].cell_contents if "key" in cells else None
