"""What a trace took for granted, written down in words and checked at every call.

    input_ids is int64 with 2 dimensions on cpu
    train mode is off, grad mode is on, autocast is off
    batch >= 2                       (asked by the model's own code)
    config is as it was

A call that breaks one is not this graph's to serve.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from liger_fx.tracing.call import (
    CallSpec,
    Constant,
    InputSpec,
    Items,
    Number,
    Opaque,
    Spec,
    may_hold_more,
)
from liger_fx.tracing.check import Check

# The graph's inputs for a call of a block with these named arguments; None if it is not for them.
Take = Callable[[nn.Module, Mapping[str, Any]], tuple[Any, ...] | None]


@dataclass(frozen=True)
class Read:
    """What the code read of an opaque argument, step by step, and found.

    steps: ("attr", name), ("item", key) or ("call", method, *arguments); a key or an argument that
    is an attribute of the block is written as Attribute.
    """

    argument: str
    steps: tuple[tuple[Any, ...], ...]
    value: Any

    def __str__(self) -> str:
        return f"{self.argument}{_steps_text(self.steps)} is {self.value!r}"


@dataclass(frozen=True)
class Attribute:
    """An int that a module of the block holds: ``self_attn.layer_idx``."""

    path: str


# What a model's code may ask of the process; patches.py notes it, and it is asked again at a call.
MODES: dict[str, Callable[[], Any]] = {
    name: getattr(torch, name)
    for name in (
        "get_default_dtype", "is_inference_mode_enabled", "are_deterministic_algorithms_enabled",
        "is_deterministic_algorithms_warn_only_enabled", "get_deterministic_debug_mode",
        "is_anomaly_enabled", "is_anomaly_check_nan_enabled", "get_float32_matmul_precision",
        "get_num_threads",
    )
    if hasattr(torch, name)
}  # fmt: skip


@dataclass(frozen=True)
class TensorFacts:
    """What the code asked of parameters and buffers, and found, by path; ``layouts`` are strides
    and the offset."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    trained: dict[str, bool] = field(default_factory=dict)
    layouts: dict[str, tuple[tuple[int, ...], int] | None] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """Each as a line of text."""
        lines = [f"{path} is of shape {shape}" for path, shape in self.shapes.items()]
        lines += [f"{path} is {dtype}" for path, dtype in self.dtypes.items()]
        lines += [
            f"{path} is sparse"
            if layout is None
            else f"{path} has strides {layout[0]}, and starts at {layout[1]}"
            for path, layout in self.layouts.items()
        ]
        lines += [f"{path} is a {cls.__name__}" for path, cls in self.classes.items()]
        return lines + [
            f"{path} is {'trained' if on else 'frozen'}" for path, on in self.trained.items()
        ]


@dataclass(frozen=True)
class Guards:
    """The assumptions of one trace.

    ``sizes`` are Python expressions over the names of sizes, and over ``attributes``, which map
    names to the ints of modules that alike blocks do not share. ``grad_enabled`` is None where the
    graph serves both; ``autocast`` maps device types to the dtype autocast had, or None where it
    was off. ``reads`` are what the code asked of opaque arguments; ``numbers`` what it compared,
    by the names that ``sizes`` have for it. ``other_mode`` are modules in the other mode than
    ``training`` says, by path. ``contiguous``: every tensor input must be, because the code asked
    for strides. ``plain``: every one must be a torch.Tensor and no subclass of it, because the code
    asked for its class. ``order``: that of the arguments which ``**kwargs`` gathers. ``distinct``:
    no tensor may be given twice. ``modes`` are answers of functions in MODES.
    """

    call: CallSpec
    sizes: tuple[str, ...]
    training: bool
    grad_enabled: bool | None
    autocast: dict[str, torch.dtype | None]
    attention_fixed: bool
    attributes: dict[str, str] = field(default_factory=dict)
    reads: tuple[Read, ...] = ()
    numbers: dict[str, Read] = field(default_factory=dict)
    other_mode: tuple[str, ...] = ()
    contiguous: bool = False
    plain: bool = False
    order: tuple[str, ...] = ()
    distinct: bool = False
    modes: dict[str, Any] = field(default_factory=dict)
    tensors: TensorFacts = field(default_factory=TensorFacts)

    def describe(self) -> list[str]:
        """Each assumption as a line of text."""
        lines = [f"{name} is {spec}" for name, spec in self.call.arguments.items()]
        lines.append("no other input is given")
        told = {name: f"{r.argument}{_steps_text(r.steps)}" for name, r in self.numbers.items()}
        sizes = (_with_places(guard, told) for guard in self.sizes)
        lines += [f"{guard}, asked by the model's code" for guard in sizes]
        lines += [f"{read}, asked by the model's code" for read in self.reads]
        asked = [f"torch.{name}() is {value}" for name, value in self.modes.items()]
        asked += self.tensors.describe()
        asked += ["all tensors are contiguous"] * self.contiguous
        asked += ["all tensors are plain ones, no parameters"] * self.plain
        if self.order:
            lines.append(f"{', '.join(self.order)} are given in this order")
        lines += [f"{line}, asked by the model's code" for line in asked]
        lines += ["no tensor is given twice"] * self.distinct
        lines.append(f"the model is in {'train' if self.training else 'eval'} mode")
        lines += [f"{path} is not" for path in self.other_mode]
        if self.grad_enabled is not None:
            lines.append(f"grad mode is {'on' if self.grad_enabled else 'off'}")
        for device, dtype in self.autocast.items():
            lines.append(f"autocast on {device} is {'off' if dtype is None else dtype}")
        lines.append("parameters keep their dtype and device, and the config its values")
        if self.attention_fixed:
            lines.append("so does its attention implementation")
        lines.append("no hook stands on a module that the graph goes through, or on all modules")
        lines.append("what the code read of its modules' attributes and of globals stays so")
        return lines

    def add_modes(self, check: Check) -> None:
        """Add that this thread's grad and autocast modes are those of the trace."""
        if self.grad_enabled is not None:
            check.add(f"{{}}() is {self.grad_enabled}", torch.is_grad_enabled)
        for kind, dtype in self.autocast.items():
            if dtype is None:
                check.add(f"not {{}}({kind!r})", torch.is_autocast_enabled)
            else:
                check.add(f"{{}}({kind!r}) is {{}}", _autocast_dtype, dtype)
        for name, value in self.modes.items():
            check.add("{}() == {}", MODES[name], value)

    def reads_hold(self, block: nn.Module, examples: Mapping[str, Any]) -> bool:
        """Whether opaque arguments, by name, would answer what the code asked as they did."""
        return all(_answers(read, block, examples) for read in self.reads)

    @property
    def _sizes(self) -> set[Any]:
        """The sizes of the call's tensors, and the numbers that are sizes."""
        sizes: set[Any] = {size for spec in self.call.tensors.values() for size in spec.sizes}
        return sizes | {spec.size for _, spec in self.call.leaves() if isinstance(spec, Number)}

    def sizes_hold(self, hints: Mapping[str, int]) -> bool:
        """Whether what the code asked of sizes alone holds for these; of a size that is not among
        them nothing is known, and nothing said."""
        unknown = {*self._sizes, *self.numbers, *self.attributes} - hints.keys()
        asked = (guard for guard in self.sizes if unknown.isdisjoint(_NAME.findall(guard)))
        try:
            return all(eval(_code(guard), {"math": math}, dict(hints)) for guard in asked)
        except ArithmeticError:  # a division by a size of zero
            return False

    def holds_for_attributes(self, block: nn.Module) -> bool:
        """Whether what the code asked of the block's own ints holds for this block's."""
        places = {name: attribute_text(path) for name, path in self.attributes.items()}
        scope = {"math": math, "block": block}
        asked = (set(_NAME.findall(guard)) for guard in self.sizes)
        others = self._sizes | self.numbers.keys()
        own = [not names & others and names & places.keys() for names in asked]
        try:
            return all(
                eval(_code(_with_places(guard, places)), scope)
                for guard, is_own in zip(self.sizes, own, strict=True)
                if is_own
            )
        except ArithmeticError:  # a division by a number that is zero says nothing of the block
            return False


@functools.lru_cache(4096)
def _code(guard: str) -> types.CodeType:
    """A guard's text, compiled under the name by which who watches a process knows them."""
    return compile(guard, "<guards>", "eval")


def _answers(read: Read, block: nn.Module, examples: Mapping[str, Any]) -> bool:
    if read.argument not in examples:
        return True
    scope = {"block": block, "value": examples[read.argument]}
    try:
        found = eval(_code(f"value{_steps_text(read.steps)}"), scope)
        return type(found) is type(read.value) and bool(found == read.value)
    except (LookupError, AttributeError, ArithmeticError, TypeError):
        return False


def autocast_state(devices: tuple[str, ...]) -> dict[str, torch.dtype | None]:
    """The dtype of autocast for each of these types of device, None where it is off."""
    return {device: _autocast_dtype(device) for device in devices}


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


_PLAIN_TENSORS = (torch.Tensor, FakeTensor)  # a compiler calls with fakes


def layout_of(tensor: Any) -> tuple[tuple[int, ...], int] | None:
    """The strides and the offset of a tensor that lies in memory so; None for anything else."""
    is_strided = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    return (tuple(tensor.stride()), int(tensor.storage_offset())) if is_strided else None


def compile_take(guards: Guards) -> Take:
    """A Python function that compares a call's arguments and hands out the graph's inputs;
    generated, because a loop would cost three times."""
    writer = _TakeWriter(guards)
    source = writer.source()
    scope: dict[str, Any] = {"math": math, **writer.scope}
    exec(compile(source, "<guards>", "exec"), scope)
    take: Take = scope["take"]
    return take


class _TakeWriter:
    """Writes the source of one check; ``scope`` holds the values that it compares with."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self.scope: dict[str, Any] = {}
        self.lines: list[str] = []
        self.conditions: list[str] = [f"len(arguments) == {len(guards.call.arguments)}"]
        self.inputs: list[str] = []
        self.bound = {name: attribute_text(path) for name, path in guards.attributes.items()}
        self._variables = 0

    def source(self) -> str:
        guards = self.guards
        for name, spec in guards.call.arguments.items():
            self._visit(spec, f"arguments[{name!r}]")
        names = dict(zip((name for name, _ in guards.call.leaves()), self.inputs, strict=True))
        # A symbol may also appear in a guard without being an input's size when its input was not
        # given.
        for name, read in guards.numbers.items():
            self.bound[name] = f"({names[read.argument]}{_steps_text(read.steps)})"
        self.conditions += [f"({_with_places(guard, self.bound)})" for guard in guards.sizes]
        self.conditions += [self._read(read, names) for read in guards.reads]
        if guards.order:
            gathered, order = self._constant(frozenset(guards.order)), self._constant(guards.order)
            given = f"tuple(filter({gathered}.__contains__, arguments))"
            self.conditions.append(f"{given} == {order}")
        if guards.distinct:
            tensors = [names[name] for name in guards.call.tensors]
            pairs = itertools.combinations(tensors, 2)
            self.conditions += [f"{a} is not {b}" for a, b in pairs]
        body = [f"        {line}" for line in self.lines]
        inputs = "".join(f"{name}, " for name in self.inputs)
        return "\n".join(
            [
                "def take(block, arguments):",
                "    try:",
                *body,
                f"        return ({inputs}) if {' and '.join(self.conditions)} else None",
                # A guard that divides by a size of zero says nothing about such a call.
                "    except (LookupError, AttributeError, ArithmeticError, TypeError):",
                "        return None",
            ]
        )

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name

    def _visit(self, spec: Spec, place: str) -> None:
        v = f"v{self._variables}"
        self._variables += 1
        if isinstance(spec, Constant):
            self._compare(spec.value, place)
            return
        self.lines.append(f"{v} = {place}")
        if isinstance(spec, Items):
            self.conditions.append(f"type({v}) is {self._constant(spec.kind)}")
            if may_hold_more(spec.kind):
                self.conditions.append(f"not {v}.__dict__")
            if spec.keys is None:
                self.conditions.append(f"len({v}) == {len(spec.items)}")
            else:  # 1 == True
                kinds = self._constant(tuple(map(type, spec.keys)))
                self.conditions.append(f"tuple({v}) == {self._constant(spec.keys)}")
                self.conditions.append(f"tuple(map(type, {v})) == {kinds}")
            for key, item in spec.places():
                self._visit(item, f"{v}[{key!r}]")
            return
        self.inputs.append(v)
        if isinstance(spec, InputSpec):
            self._tensor(spec, v)
        elif isinstance(spec, Number):
            self.conditions.append(f"type({v}) is {self._constant(spec.kind)}")
            if spec.size is not None:
                self._size(spec.size, v)
        elif isinstance(spec, Opaque):
            self.conditions.append(f"type({v}) is {self._constant(spec.cls)}")

    def _compare(self, value: Any, place: str) -> None:
        if value is None or isinstance(value, bool):
            self.conditions.append(f"{place} is {value!r}")
            return
        name = self._constant(value)
        self.conditions += [f"type({place}) is type({name})", f"{place} == {name}"]
        if isinstance(value, float) and value == 0:  # 0.0 == -0.0
            self.conditions.append(f"math.copysign(1, {place}) == {math.copysign(1, value)}")

    def _tensor(self, spec: InputSpec, v: str) -> None:
        self.lines.append(f"s{v} = {v}.shape")
        self.conditions += [
            f"len(s{v}) == {len(spec.sizes)}",
            f"{v}.dtype is {self._constant(spec.dtype)}",
            f"{v}.device == {self._constant(spec.device)}",
        ]
        for dim, size in enumerate(spec.sizes):
            if isinstance(size, str) and size not in self.bound:
                # A symbolic size is positive: what the code asks of an empty tensor, a trace
                # answers without a guard.
                self.conditions.append(f"s{v}[{dim}] > 0")
            self._size(size, f"s{v}[{dim}]")
        if self.guards.plain:
            self.conditions.append(f"type({v}) in {self._constant(_PLAIN_TENSORS)}")
        if self.guards.contiguous:
            self.conditions += [
                f"{v}.layout is {self._constant(torch.strided)}",
                f"{v}.is_contiguous()",
                f"{v}.storage_offset() == 0",
            ]

    def _size(self, size: int | str, place: str) -> None:
        if isinstance(size, str) and size not in self.bound:
            self.bound[size] = place
        else:
            wanted = size if isinstance(size, int) else self.bound[size]
            self.conditions.append(f"{place} == {wanted}")

    def _read(self, read: Read, names: Mapping[str, str]) -> str:
        value = names[read.argument] + _steps_text(read.steps)
        if read.value is None or isinstance(read.value, bool):
            return f"{value} is {read.value!r}"
        name, found = self._constant(read.value), f"r{len(self.scope)}"
        return f"type({found} := {value}) is type({name}) and {found} == {name}"


def _steps_text(steps: tuple[tuple[Any, ...], ...]) -> str:
    text = ""
    for kind, name, *arguments in steps:
        if kind == "attr":
            text += f".{name}"
        elif kind == "item":
            text += f"[{_step_value(name)}]"
        else:
            text += f".{name}({', '.join(map(_step_value, arguments))})"
    return text


def _step_value(value: Any) -> str:
    return attribute_text(value.path) if isinstance(value, Attribute) else repr(value)


def attribute_text(path: str) -> str:
    """The attribute below the variable ``block``; a number in the path is a child of a list."""
    parts = path.split(".") if path else []
    return "block" + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in parts)


_NAME = re.compile(r"(?<![\w.])[^\W\d]\w*")  # not the e5 of 1e5


def _with_places(text: str, places: Mapping[str, str]) -> str:
    """``text`` with the place of each size for its name."""
    return _NAME.sub(lambda match: places.get(match[0], match[0]), text)
