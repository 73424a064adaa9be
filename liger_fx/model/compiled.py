"""A call of a block inside torch.compile: its plan is found, or made, while Dynamo compiles.

    compiled = torch.compile(opt, fullgraph=True); compiled(input_ids=ids, use_cache=False)
 ->
    at compile time   the plan for such a call, chosen as any call chooses it, on stand-ins
    what is compiled  the plan's check of its arguments and its function, no graph break

Dynamo guards what the check and the function read, and that the block still is like those that
share the plan. The other plans it does not see: a new one compiles nothing again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.comptime import comptime

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.inner_blocks import rebuilt


class _Found(threading.local):
    """The name under which the plan found last is kept, on its way into what is compiled."""

    name: str | None = None


_found = _Found()


def call_compiled(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of the plan that serves this call, else of the class's own forward."""
    arguments = block.signature.named(args, kwargs)
    leaves: list[Any] = []
    objects: list[Any] = []
    outline = _outline(arguments, leaves, objects)  # noqa: F841  (_find_plan reads it)
    comptime(_find_plan)
    name = _name_of_found(id(block._block.alike))  # the id is guarded
    if name is None:
        return block.block_class.forward(block, *args, **kwargs)
    plan = getattr(block._block.alike.compiled, name)
    inputs = plan.take(block, arguments)
    return plan.function(block, *inputs)


@torch.compiler.assume_constant_result
def _name_of_found(alike: int) -> str | None:
    return _found.name


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
    block = _held_by(context, "block").value
    leaves = map(_known_of, context.get_local("leaves").as_proxy())
    objects = (variable.realize().value for variable in _held_by(context, "objects").items)
    arguments = _filled(context.get_local("outline").as_python_constant(), leaves, objects)
    plan = block.plan_for_compiler(arguments)
    _found.name = None if plan is None else block._block.alike.keep_compiled(plan)


def _held_by(context: Any, name: str) -> Any:
    return context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().realize()


def _known_of(leaf: Any) -> Any:
    """The fake tensor, or symbolic number, behind a value of the graph; what is plain as it is."""
    return leaf.node.meta["example_value"] if isinstance(leaf, fx.Proxy) else leaf
