"""The kernels of a plan's named modules, compiled before a call needs them.

    optimize(model); loss(...).backward()
 ->
    what a step launches on a GPU is compiled while the first batch is fetched, a thread a kernel

The graph is walked with tensors that have sizes and strides and nothing in them. Where they are not
known, or other than in the call, a kernel is compiled at its first launch, as any is.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, getitem
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from liger_fx.model.apart import apart
from liger_fx.model.plan import Plan
from liger_fx.modules.compile_ahead import (
    NOT_FOLLOWED,
    compiling_ahead,
    emptied,
    is_compiled_for,
    trained,
    walk_through,
)
from liger_fx.modules.origin import NamedModule
from liger_fx.tracing.call import flat_inputs, named_arguments
from liger_fx.tracing.trace import TensorSpec
from liger_fx.tracing.walk import module_at

_UNKNOWN = object()


def compile_ahead(block: nn.Module, plan: Plan, arguments: Mapping[str, Any]) -> None:
    """Begin to compile what the named modules in the plan of a block, and in the plans that it
    calls, would launch for such a call; and what the backward would, where it is train mode."""

    def walk() -> None:
        with compiling_ahead():
            inputs = map(emptied, flat_inputs(plan.guards.call.arguments, arguments))
            _Walk(block, plan, list(inputs), set()).run()

    if is_compiled_for(block):
        apart(walk)  # from a checkpoint that would compute the block again, and from any mode


class _Walk:
    """One walk through a graph: what is known of the value of each node."""

    def __init__(self, block: nn.Module, plan: Plan, inputs: list[Any], walked: set[Plan]) -> None:
        self.block, self.plan, self.walked = block, plan, walked
        self.trains = plan.guards.training
        placeholders = plan.graph.find_nodes(op="placeholder")
        self.values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
        self.sizes: dict[Any, int] = {}
        for node, value in self.values.items():
            if isinstance(value, torch.Tensor):
                self.sizes |= zip(node.meta["spec"].shape, value.shape, strict=True)

    def run(self) -> None:
        self.walked.add(self.plan)
        for node in self.plan.graph.nodes:
            if node.op != "placeholder":
                try:
                    self.values[node] = self._value(node)
                except NOT_FOLLOWED:
                    self.values[node] = _UNKNOWN

    def _value(self, node: fx.Node) -> Any:
        mapped: Any = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        args, kwargs = mapped
        given = tree_leaves(mapped)
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        is_trained = self.trains and any(tensor.requires_grad for tensor in tensors)
        is_known = not any(value is _UNKNOWN for value in given)
        target: Any = node.target
        if node.op == "call_module":
            module: Any = module_at(self.block, target)
            if "plan" in node.meta:
                self._into(module, module._block.alike.plans[node.meta["plan"]], args, kwargs)
            elif isinstance(module, NamedModule) and is_known:
                return walk_through(module, args, kwargs, self.trains)
            trains = self.trains and any(p.requires_grad for p in module.parameters())
            is_trained = is_trained or trains
        elif node.op == "get_attr":
            is_trained = getattr(attrgetter(target)(self.block), "requires_grad", False)
        elif node.op == "call_method" and is_known:  # a view, often: it decides on strides
            result = getattr(args[0], target)(*args[1:], **kwargs)
            return tree_map(lambda x: trained(x, is_trained), result)
        elif target is getitem and is_known:
            return trained(args[0][args[1]], is_trained)
        elif target is torch._C._set_grad_enabled:
            self.trains = args[0] and self.plan.guards.training
        return trained(self._empty(node.meta.get("spec")), is_trained)

    def _empty(self, spec: TensorSpec | None) -> Any:
        if spec is None:
            return _UNKNOWN
        sizes = [sympy.sympify(size).subs(self.sizes) for size in spec.shape]
        if not all(size.is_Integer for size in sizes):
            return _UNKNOWN
        return torch.empty(list(map(int, sizes)), dtype=spec.dtype, device=spec.device)

    def _into(self, block: Any, plan: Plan, args: Any, kwargs: Any) -> None:
        if plan not in self.walked:
            arguments = named_arguments(block.block_class.forward, args, kwargs)
            inputs = flat_inputs(plan.guards.call.arguments, arguments)
            _Walk(block, plan, inputs, self.walked).run()
