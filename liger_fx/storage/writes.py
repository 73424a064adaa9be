"""A saved graph computes: it does not change the tensors of the model that it is bound to.

weight = get_attr lm_head.weight; data = weight.data; data.fill_(0.5)     ->  LoadError
scores = softmax(x); scores.div_(total)                                   ->  fine

Models write in place into what they have just computed. Whether a value may be (a view of) a tensor
of the model is told from the calls that made it; those that always give memory of their own are
listed, all others are taken to give back what they were given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import liger_fx.modules
from liger_fx.errors import LoadError
from liger_fx.storage.targets import IN_PLACE, MAKES_NEW

# Modules whose result is new memory. Others may return what they were given, or what they hold.
_NEW_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d,
    nn.Conv3d, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.Softplus,
    *(getattr(liger_fx.modules, name) for name in liger_fx.modules.__all__),
)  # fmt: skip
# Arguments that a function writes into unless it is told not to, and by which argument.
_STATISTICS: dict[Any, tuple[tuple[str, ...], str]] = {
    F.batch_norm: (("running_mean", "running_var"), "training"),
    F.instance_norm: (("running_mean", "running_var"), "use_input_stats"),
    F.embedding: (("weight",), "max_norm"),
    F.embedding_bag: (("weight",), "max_norm"),
}
# The same of functions that Python cannot ask for their signature: by position.
_POSITIONS: dict[Any, slice] = {torch.batch_norm: slice(3, 5), torch.instance_norm: slice(3, 5)}


def check_writes(
    graph: fx.Graph, tensors: Collection[str], modules: Mapping[str, nn.Module]
) -> None:
    """LoadError for a node that writes into one of the model's ``tensors``, or may do so."""
    holding: dict[fx.Node, str] = {}
    for node in graph.nodes:
        for written in _written(node, modules):
            if written in holding:
                raise LoadError(f"writes into {holding[written]}, a tensor of the model", node.name)
        if node.op == "get_attr":
            if node.target in tensors:
                holding[node] = str(node.target)
        elif not _makes_new(node, modules):
            held = [holding[read] for read in node.all_input_nodes if read in holding]
            if not held and node.op == "call_module" and _has_tensors(modules[str(node.target)]):
                held = [str(node.target)]
            if held:
                holding[node] = held[0]


def _makes_new(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _NEW_MODULES)
    return (node.op, node.target) in MAKES_NEW and "out" not in node.kwargs


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _written(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterable[fx.Node]:
    """The nodes whose values a node may write into."""
    values: list[Any] = [node.kwargs.get("out")]
    if node.op == "call_module" and getattr(modules[str(node.target)], "inplace", False):
        values += [node.args, node.kwargs]
    elif (node.op, node.target) in IN_PLACE:
        values += [node.args[:1], node.kwargs]
    elif node.op == "call_function":
        values += _written_by_option(node)
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return found


def _written_by_option(node: fx.Node) -> list[Any]:
    if node.target in _POSITIONS:
        return [node.args[_POSITIONS[node.target]], node.kwargs]
    names, option = _STATISTICS.get(node.target, ((), "inplace"))
    signature = _signature(node.target)
    if signature is None or option not in signature.parameters:
        return []
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:  # it will fail before it writes
        return []
    bound.apply_defaults()
    given = bound.arguments[option]
    if given is None or given is False:
        return []
    return [bound.arguments[name] for name in names] or [node.args[:1], node.kwargs]


@functools.cache
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a builtin
        return None
