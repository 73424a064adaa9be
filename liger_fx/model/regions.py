"""Alike layers inside torch.compile: one region, compiled once and called for each of them.

    layers.0, layers.1, ..., layers.15  ->  one compiled function, called sixteen times

A region is torch.compiler.nested_compile_region's. Up to PyTorch 2.13 Inductor hands on the memory
of what a region was given, though the region kept it for its backward, and lets a backward
overwrite what belongs to its caller (pytorch/pytorch#193960): gradients are wrong without a word.
So what has regions is compiled with no memory handed on (``inductor.py``); its allocator alone uses
memory again.

What draws random numbers is no region, nor are layers with caches.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from liger_fx.engine.memory import Memory
from liger_fx.model.plan import Plan
from liger_fx.tracing.effects import draws_random_numbers, is_effectful


def can_be_region(plan: Plan, block: Any) -> bool:
    """Whether a call of the plan is one of several alike, and computes new tensors and does nothing
    else, so that it can be compiled as a region."""
    alone = len(block._block.alike.members) == 1
    if alone or plan.has_regions or plan.inner:
        return False
    nodes = list(plan.graph.nodes)
    memory = Memory(block)
    if any(is_effectful(node, block) or _draws(node, memory) for node in nodes):
        return False
    results = [memory.storage(node) for node in nodes[-1].all_input_nodes]
    return len(set(results)) == len(results) and all(_is_new(node, memory) for node in results)


def _draws(node: fx.Node, memory: Memory) -> bool:
    """In any mode: one plan may serve both."""
    if node.op == "call_module":
        return any(isinstance(m, _DropoutNd) and m.p for m in memory.module(node).modules())
    return draws_random_numbers(node)


def _is_new(node: fx.Node, memory: Memory) -> bool:
    """Whether the node's value lies in memory of its own, for certain."""
    if node.op == "call_module":
        return _is_known(type(memory.module(node)))
    return node.op in ("call_function", "call_method")


def _is_known(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.nn.", "liger_fx."))
