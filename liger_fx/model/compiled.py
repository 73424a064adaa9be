"""A call of a block inside torch.compile: its plan is found, or made, while Dynamo compiles.

    compiled = torch.compile(opt, fullgraph=True); compiled(input_ids=ids, use_cache=False)
 ->
    at compile time   the plan for such a call, chosen as any call chooses it, on fake tensors
    what is compiled  the plan's checks and its function, no graph break

Dynamo guards what the checks and the function read, and that the block still is like those that
share the plan. The other plans it does not see: a new one compiles nothing again.

Alike layers become regions that are compiled once, where they can (``regions.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.comptime import comptime

from liger_fx.model.constant_floats import take_floats_as_before, take_floats_for_constants
from liger_fx.model.dynamo import value_of
from liger_fx.model.inductor import for_inductor
from liger_fx.model.plan import Plan
from liger_fx.model.regions import can_be_region
from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.guards import attribute_text
from liger_fx.tracing.inner_blocks import collected_in_compile, collects_inside, rebuilt
from liger_fx.tracing.tree_state import asked_modes, class_of, plain_configs


class _Found(threading.local):
    """What was found last, on its way into what is compiled: the name under which the plan is kept,
    and whether it becomes a region."""

    name: str | None = None
    is_region: bool = False


_found = _Found()


class _Kept:
    """A plan that is compiled, and the check of what Dynamo does not guard by itself."""

    def __init__(self, name: str, plan: Plan, block: nn.Module) -> None:
        self.name = name
        self.plan, self.holds, self.function = plan, _check(plan, block), plan.function
        self.can_be_region = can_be_region(plan, block)
        self.region = torch.compiler.nested_compile_region(plan.function)


def call_compiled(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of the plan that serves this call, else of the class's own forward."""
    comptime(take_floats_for_constants)
    result = _call(block, args, kwargs)
    comptime(take_floats_as_before)
    return result


def _call(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = block.signature.named(args, kwargs)
    leaves: list[Any] = []
    objects: list[Any] = []
    outline = _outline(arguments, leaves, objects)  # noqa: F841  (_find_plan reads it)
    keys = collected_in_compile()  # noqa: F841
    comptime(_find_plan)
    name, is_region = _what_was_found(id(block._block.alike))  # the id is guarded
    if name is not None:
        kept = getattr(block._block.alike.compiled, name)
        if kept.holds(block):
            inputs = kept.plan.take(block, arguments)
            if inputs is not None:
                return (kept.region if is_region else kept.function)(block, *inputs)
    return block.block_class.forward(block, *args, **kwargs)


@torch.compiler.assume_constant_result
def _what_was_found(alike: int) -> tuple[str | None, bool]:
    return _found.name, _found.is_region


def _outline(value: Any, leaves: list[Any], objects: list[Any]) -> Any:
    """What a tree of arguments is made of; its tensors and plain values, and what is neither, go
    to lists. Dynamo follows it for each block: a call an argument would cost more than the rest."""
    is_mapping = isinstance(value, dict)
    items: list[Any] = []
    for item in value.values() if is_mapping else value:
        if isinstance(item, (torch.Tensor, *PLAIN)):
            leaves.append(item)
            items.append("leaf")
        elif isinstance(item, (dict, tuple, list)):
            items.append(_outline(item, leaves, objects))
        else:
            objects.append(item)
            items.append("object")
    return type(value), tuple(value) if is_mapping else None, tuple(items)


def _filled(outline: Any, leaves: Iterator[Any], objects: Iterator[Any]) -> Any:
    """The tree of that outline with these in the places of its leaves."""
    if outline == "leaf":
        return next(leaves)
    if outline == "object":
        return next(objects)
    kind, keys, items = outline
    return rebuilt(kind, keys, [_filled(item, leaves, objects) for item in items])


def _find_plan(context: Any) -> None:
    """Runs while Dynamo compiles ``call_compiled``, whose locals ``context`` shows."""
    block, leaves, objects, outline, keys = (
        value_of(context, name) for name in ("block", "leaves", "objects", "outline", "keys")
    )
    plan = None
    if not (keys and collects_inside(block, keys)):
        arguments = _filled(outline, iter(leaves), iter(objects))
        plan = block.plan_for_compiler(arguments)
    _found.name, _found.is_region = None, False
    if plan is not None:
        kept = _keep(plan, block)
        _found.name = kept.name
        on_cpu = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in leaves)
        compiler = for_inductor(context, on_cpu=on_cpu)
        if compiler is not None and compiler.calls_regions and not objects and kept.can_be_region:
            _found.is_region = compiler.has_regions = True


def _keep(plan: Plan, block: Any) -> _Kept:
    """The plan as an attribute of ``alike.compiled``: Dynamo looks an attribute up when it is asked
    for; a list it would read, and guard, as a whole."""
    known: dict[str, _Kept] = vars(block._block.alike.compiled)
    for kept in known.values():
        if kept.plan is plan:
            return kept
    name = f"plan_{len(known)}"
    kept = known[name] = _Kept(name, plan, block)
    return kept


def _check(plan: Plan, block: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether modes, plain values of the config and plain attributes that the code read are those
    that the plan was made for, as code that Dynamo can follow, and so guards.

    (It leaves hooks unguarded, here as in any model; the rest it reads by itself.)
    """
    scope: dict[str, Any] = {"MethodType": MethodType}
    conditions = ["True"]
    for path, mode in asked_modes(block, plan.followed_modules(block), plan.guards):
        conditions.append(f"{attribute_text(path)}.training is {mode}")
    for path, values in plain_configs(block, plan.facts, plan.guards):
        config, read = f"config_{len(scope)}", f"read_{len(scope)}"
        scope[config] = values
        conditions.append(f"({read} := {attribute_text(path)}.__dict__) is not None")
        conditions += [f"{read}[{name!r}] == {config}[{name!r}]" for name in values]
    for path, name, value in plan.attributes.plain(block):
        held = f"held_{len(scope)}"
        scope[held] = value
        conditions.append(f"{attribute_text(path)}.{name} == {held}")
    for path, module in plan.followed_modules(block).items():
        if path:  # one that was set on the module Dynamo guards in this spelling
            forward, own = f"forward_{len(scope)}", f"{attribute_text(path)}.forward"
            scope[forward] = class_of(module).forward
            conditions.append(f"isinstance({own}, MethodType) and {own}.__func__ is {forward}")
    for cls in (class_of(block), *plan.replaced_in(block)):  # whose forward no module shows
        of, forward = f"class_{len(scope)}", f"forward_{len(scope)}"
        scope |= {of: cls, forward: cls.forward}
        conditions.append(f"{of}.forward is {forward}")
    text = " and ".join(conditions)
    check: Callable[[nn.Module], bool] = eval(
        compile(f"lambda block: {text}", "<guards>", "eval"), scope
    )
    return check
