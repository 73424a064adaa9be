"""Logits that nothing in a compiled graph reads are no part of it.

    Dynamo records      loss = linear_cross_entropy(h, W, labels); logits = logits_of(h, W)
                        return loss, logits
    what is compiled    loss = linear_cross_entropy(h, W, labels); return loss, h
    what a call gives   loss, and lazy logits of h and W

What is compiled gives plain tensors only, and would compute them for nothing. Where something is
written to after them, a weight by an optimizer's step perhaps, they are computed where they stand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._ops import HigherOrderOperator, OpOverload

from liger_fx.modules.lazy_logits import lazy_logits
from liger_fx.modules.logits import logits_of
from liger_fx.tracing.effects import is_effectful, is_region_boundary

Complete = Callable[..., list[Any]]


class _Outside(NamedTuple):
    """Logits at this place of a graph's results, where what they are made of first is instead; of
    their weight and bias the places among its inputs (True) or its results."""

    place: int
    dtype: torch.dtype
    rest: list[tuple[bool, int] | None]
    options: tuple[Any, ...]

    def made(self, inputs: Sequence[Any], results: Sequence[Any]) -> torch.Tensor:
        """The lazy logits of a call with these inputs and results."""
        rest = [at if at is None else (inputs if at[0] else results)[at[1]] for at in self.rest]
        return lazy_logits(self._of, self.dtype, results[self.place], *rest)

    def _of(self, *inputs: Any) -> torch.Tensor:
        return logits_of(*inputs, *self.options)


def leave_logits_outside(graph: fx.GraphModule) -> Complete | None:
    """Take them out of the graph, in place. What calls the compiled graph in its stead, and gives
    them as well: ``complete(compiled, *inputs)``. None where there are none."""
    output: Any = graph.graph.output_node()
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    results: list[Any] = list(output.args[0])
    count, outside = len(results), list[_Outside]()
    last_write = max((i for i, n in enumerate(graph.graph.nodes) if _may_write(n)), default=-1)
    waiting = set(itertools.islice(graph.graph.nodes, last_write + 1, None))
    for place, node in enumerate(results[:count]):
        if node.target is logits_of and set(node.users) == {output} and node in waiting:
            h, *rest = node.args[:3]
            results[place] = h
            places = [None if x is None else _place(x, inputs, results) for x in rest]
            dtype = node.meta["example_value"].dtype
            outside.append(_Outside(place, dtype, places, node.args[3:]))
    if not outside:
        return None
    left = [node for node in output.args[0] if node not in results]
    output.args = (tuple(results),)
    for node in left:
        graph.graph.erase_node(node)
    graph.recompile()
    return functools.partial(_complete, outside, count)


def _may_write(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, HigherOrderOperator):  # a region writes to nothing (regions.py)
        return target is not invoke_subgraph
    return node.op == "call_module" or is_effectful(node) and not is_region_boundary(node)


def _place(node: fx.Node, inputs: list[fx.Node], results: list[Any]) -> tuple[bool, int]:
    if node in inputs:
        return True, inputs.index(node)
    if node not in results:
        results.append(node)
    return False, results.index(node)


def _complete(outside: list[_Outside], count: int, compiled: Any, *inputs: Any) -> list[Any]:
    results = compiled(*inputs)
    lazy = {these.place: these.made(inputs, results) for these in outside}
    return [lazy.get(place, result) for place, result in enumerate(results[:count])]
