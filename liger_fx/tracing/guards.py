"""What a trace took for granted, written down in words and checked at every call.

    input_ids is int64 with 2 dimensions on cpu
    train mode is off, grad mode is on, autocast is off
    batch >= 2                       (asked by the model's own code)
    config is as it was

A call that breaks one is not this graph's to serve.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import nn
from torch.utils._sympy.printers import PythonPrinter

from liger_fx.tracing.call import CallSpec, InputSpec

if TYPE_CHECKING:
    from liger_fx.tracing.tracer import HFTracer

_UNGUARDED_CONFIG = ("_attn_implementation_internal", "_attn_implementation")
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

    @classmethod
    def of_trace(cls, tracer: HFTracer, call: CallSpec) -> Guards:
        """The guards of a trace that just finished in this thread's modes."""
        return cls(
            call=call,
            sizes=tuple(_size_guards(tracer)),
            training=tracer.root.training,
            grad_enabled=torch.is_grad_enabled(),
            autocast=_autocast_state(_device_types(tracer.root, call)),
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
        lines.append("no forward hook stands on a module that the graph goes through")
        return lines

    def bind(self, root: nn.Module, modules: list[nn.Module]) -> Check:
        """A fast check of a call's named arguments against a tree.

        ``modules`` are those whose code the graph replaces: their hooks and modes are assumptions
        too.
        """
        state = _TreeState(root, modules, self.training)
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


class _TreeState:
    """Modes, hooks, dtypes, devices and configs of a module tree, compared in a few
    microseconds."""

    def __init__(self, root: nn.Module, modules: list[nn.Module], training: bool) -> None:
        self.training = training
        self.modes = [
            m.__dict__ for m in modules if m is root or _code_mentions(type(m), "training")
        ]
        self.hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.checkpointing = [m.__dict__ for m in modules if hasattr(m, "gradient_checkpointing")]
        self.tensors = _telling_tensors(root, modules)
        self.dtypes = list(map(_dtype, self.tensors))
        self.devices = list(map(_device, self.tensors))
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        self.configs = [(vars(config), copy.deepcopy(vars(config))) for config in configs.values()]

    def holds(self) -> bool:
        training = self.training
        for mode in self.modes:
            if mode["training"] is not training:
                return False
        if any(self.hooks) and not all(map(_are_capturing, self.hooks)):
            return False
        if training:
            for attributes in self.checkpointing:
                if attributes.get("gradient_checkpointing"):
                    return False
        if list(map(_dtype, self.tensors)) != self.dtypes:
            return False
        if list(map(_device, self.tensors)) != self.devices:
            return False
        return all(now == then or _same_config(now, then) for now, then in self.configs)


_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")


def _telling_tensors(root: nn.Module, modules: list[nn.Module]) -> list[torch.Tensor]:
    """Parameters whose dtype decides what the graph's frozen casts mean.

    Those that modules of the graph hold themselves, and embeddings, up to a handful of each class:
    a model changes dtype as a whole or by kind of module, and a deep one must not pay for every
    layer.
    """
    counts: dict[tuple[type, str], int] = {}
    found: dict[int, torch.Tensor] = {}
    for module in root.modules():
        if isinstance(module, nn.Linear):
            continue  # a linear layer of another dtype than its input raises by itself
        for name, tensor in module._parameters.items():
            key = (type(module), name)
            counts[key] = counts.get(key, 0) + 1
            if tensor is not None and counts[key] <= 8:
                found.setdefault(id(tensor), tensor)
    first = next(root.parameters(), None)
    if first is not None:
        found.setdefault(id(first), first)
    return list(found.values())


def _same_config(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """The attention implementation may change (it is looked up when the graph runs); nothing else
    may."""
    names = now.keys() | then.keys()
    missing = object()
    return all(
        now.get(name, missing) == then.get(name, missing)
        for name in names
        if name not in _UNGUARDED_CONFIG
    )


def _are_capturing(hooks: Mapping[int, Any]) -> bool:
    """transformers' own hooks for output_hidden_states do nothing unless that is asked for."""
    return all("output_capturing_hook" in getattr(h, "__qualname__", "") for h in hooks.values())


def _code_mentions(cls: type, name: str) -> bool:
    """Whether a method of the class (PyTorch's own aside) uses an attribute of that name."""
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            continue
        for value in vars(base).values():
            code = getattr(getattr(value, "__wrapped__", value), "__code__", None)
            if code is not None and name in code.co_names:
                return True
    return False


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
    for guard in guards.sizes:
        expression = guard
        for name, place in sorted(bound.items(), key=lambda item: -len(item[0])):
            expression = _replace_word(expression, name, place)
        conditions.append(f"({expression})")
    lines += ["    except (KeyError, AttributeError):", "        return False"]
    lines.append("    return " + " and ".join(conditions))
    scope["math"] = __import__("math")
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


def _replace_word(text: str, word: str, replacement: str) -> str:
    import re

    return re.sub(rf"\b{re.escape(word)}\b", replacement, text)
