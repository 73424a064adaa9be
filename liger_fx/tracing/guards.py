"""What a trace took for granted, written down in words and checked at every call.

    input_ids is int64 with 2 dimensions on cpu
    train mode is off, grad mode is on, autocast is off
    batch >= 2                       (asked by the model's own code)
    config is as it was

A call that breaks one is not this graph's to serve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import nn
from torch.utils._sympy.printers import PythonPrinter

from liger_fx.tracing.call import CallSpec, InputSpec
from liger_fx.tracing.tree_state import Modules, TreeFacts, TreeState

if TYPE_CHECKING:
    from liger_fx.tracing.tracer import HFTracer

Check = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Guards:
    """The assumptions of one trace.

    ``sizes`` are Python expressions over the names of sizes; ``autocast`` maps device types to the
    dtype autocast had, or None where it was off.
    """

    call: CallSpec
    sizes: tuple[str, ...]
    training: bool
    grad_enabled: bool
    autocast: dict[str, torch.dtype | None]
    attention_fixed: bool

    @classmethod
    def of_trace(cls, tracer: HFTracer, call: CallSpec) -> Guards:
        """The guards of a trace that just finished in this thread's modes."""
        return cls(
            call=call,
            sizes=tuple(_size_guards(tracer)),
            training=tracer.root.training,
            grad_enabled=torch.is_grad_enabled(),
            autocast=_autocast_state(_device_types(tracer.root, call)),
            attention_fixed=tracer.leaves.masks_are_read,
        )

    def describe(self) -> list[str]:
        """Each assumption as a line of text."""
        lines = [f"{name} is {spec}" for name, spec in self.call.tensors.items()]
        lines += [f"{name} is {value!r}" for name, value in self.call.constants.items()]
        lines.append("no other input is given")
        lines += [f"{guard}, asked by the model's code" for guard in self.sizes]
        lines.append(f"the model is in {'train' if self.training else 'eval'} mode")
        lines.append(f"grad mode is {'on' if self.grad_enabled else 'off'}")
        for device, dtype in self.autocast.items():
            lines.append(f"autocast on {device} is {'off' if dtype is None else dtype}")
        lines.append("parameters keep their dtype and device, and the config its values")
        if self.attention_fixed:
            lines.append("so does its attention implementation")
        lines.append("no hook stands on a module that the graph goes through, or on all modules")
        lines.append("plain attributes of its modules (eps, scaling) stay so: this is not checked")
        return lines

    def bind(self, root: nn.Module, modules: Modules, facts: TreeFacts) -> Check:
        """A fast check of a call's named arguments against a tree that shall be as in ``facts``.

        ``modules`` are those whose code the graph replaces: their hooks and modes are assumptions
        too.
        """
        state = TreeState(root, modules, facts, self.training, self.attention_fixed)
        inputs_hold = _compile_inputs(self)
        grad_enabled, autocast = self.grad_enabled, self.autocast
        is_grad_enabled = torch.is_grad_enabled
        devices = tuple(autocast)

        def holds(arguments: Mapping[str, Any]) -> bool:
            return (
                inputs_hold(arguments)
                and is_grad_enabled() is grad_enabled
                and _autocast_state(devices) == autocast
                and state.holds()
            )

        return holds


def _autocast_state(devices: tuple[str, ...]) -> dict[str, torch.dtype | None]:
    return {
        device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in devices
    }


def _device_types(root: nn.Module, call: CallSpec) -> tuple[str, ...]:
    types = {spec.device.type for spec in call.tensors.values()}
    types |= {p.device.type for p in root.parameters()}
    return tuple(sorted(types - {"meta"})) or ("cpu",)


def _size_guards(tracer: HFTracer) -> list[str]:
    """Size comparisons of the model's own code, and sizes of inputs that came out fixed or tied."""
    names = {sympy.Symbol(str(s.node._expr)): n for n, s in tracer.world.symbols.items()}
    printer = PythonPrinter()

    def text(expr: sympy.Basic) -> str:
        named = expr.subs(
            {s: sympy.Symbol(names[sympy.Symbol(str(s))], integer=True) for s in expr.free_symbols}
        )
        return printer.doprint(named)

    known = set(names)
    guards: list[str] = []
    for guard in tracer.recorder.own_guards:
        expr = guard.expr
        if {sympy.Symbol(str(s)) for s in expr.free_symbols} <= known:
            guards.append(text(expr))
    for name, size in tracer.world.symbols.items():
        now = size.node.expr
        if now != size.node._expr:
            guards.append(f"{name} == {text(now)}")
    return sorted(set(guards) - {"True"})


def _compile_inputs(guards: Guards) -> Check:
    """A Python function that compares a call's inputs; generated, because a loop would cost three
    times."""
    scope: dict[str, Any] = {"constants": guards.call.constants}
    lines = ["def inputs_hold(arguments):", "    try:"]
    bound: dict[str, str] = {}
    conditions = [f"len(arguments) == {len(guards.call.tensors) + len(guards.call.constants)}"]
    for i, (name, spec) in enumerate(guards.call.tensors.items()):
        lines.append(f"        x{i} = arguments[{name!r}]; s{i} = x{i}.shape")
        scope[f"dtype{i}"], scope[f"device{i}"] = spec.dtype, spec.device
        conditions += [
            f"len(s{i}) == {len(spec.sizes)}",
            f"x{i}.dtype is dtype{i}",
            f"x{i}.device == device{i}",
        ]
        conditions += _size_conditions(i, spec, bound)
    for i, name in enumerate(guards.call.constants):
        lines.append(f"        c{i} = arguments[{name!r}]")
        conditions.append(
            f"type(c{i}) is type(constants[{name!r}]) and c{i} == constants[{name!r}]"
        )
    # A symbol may also appear in a guard without being an input's size when its input was not
    # given.
    conditions += [f"({_with_places(guard, bound)})" for guard in guards.sizes]
    lines.append("        return " + " and ".join(conditions))
    # A guard that divides by a size of zero says nothing about such a call.
    lines += ["    except (KeyError, AttributeError, ArithmeticError):", "        return False"]
    scope["math"] = math
    exec(compile("\n".join(lines), "<guards>", "exec"), scope)
    return scope["inputs_hold"]


def _size_conditions(i: int, spec: InputSpec, bound: dict[str, str]) -> list[str]:
    conditions = []
    for dim, size in enumerate(spec.sizes):
        place = f"s{i}[{dim}]"
        if isinstance(size, int):
            conditions.append(f"{place} == {size}")
        elif size in bound:
            conditions.append(f"{place} == {bound[size]}")
        else:
            bound[size] = place
    return conditions


def _with_places(text: str, places: Mapping[str, str]) -> str:
    """``text`` with the place of each size for its name."""
    return re.sub(r"[^\W\d]\w*", lambda match: places.get(match[0], match[0]), text)
