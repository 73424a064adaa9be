"""A graph as plain data and back, by writing its nodes down rather than by tracing generated code
again.

   add = operator.add(mul, 2)
->
   {"name": "add", "op": "call_function", "target": "_operator.add", "args": [{"node": 3}, 2], ...}
"""

from __future__ import annotations

import builtins
import importlib
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

Encoded = dict[str, Any]
_META = ("spec", "module", "source", "rewrite", "plan")


def encode_graph(graph: fx.Graph) -> list[Encoded]:
    """Every node of the graph in order, as dictionaries of plain values."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": node.target
            if isinstance(node.target, str)
            else _get_qualified_name(node.target),
            "args": _encode(node.args, index),
            "kwargs": _encode(node.kwargs, index),
            "meta": {key: node.meta[key] for key in _META if key in node.meta},
        }
        for node in graph.nodes
    ]


def decode_graph(records: list[Encoded]) -> fx.Graph:
    """The graph that ``encode_graph`` wrote down."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for record in records:
        target = record["target"]
        if record["op"] == "call_function":
            target = _named(target)
        node = graph.create_node(
            record["op"],
            target,
            _decode(record["args"], nodes),
            _decode(record["kwargs"], nodes),
            name=record["name"],
        )
        node.meta.update(record["meta"])
        nodes.append(node)
    return graph


class _NodeIndex(int):
    """A reference to the node of this index, among plain arguments."""


def _encode(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return _NodeIndex(index[value])
    if isinstance(value, slice):
        return slice(*(_encode(part, index) for part in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_encode(item, index) for item in value)
            if type(value) in (list, tuple)
            else tuple(_encode(item, index) for item in value)
        )
    if isinstance(value, dict):
        return {key: _encode(item, index) for key, item in value.items()}
    return value


def _decode(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, _NodeIndex):
        return nodes[value]
    if isinstance(value, slice):
        return slice(*(_decode(part, nodes) for part in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)):
        return type(value)(_decode(item, nodes) for item in value)
    if isinstance(value, dict):
        return {key: _decode(item, nodes) for key, item in value.items()}
    return value


def _named(qualified: str) -> Any:
    """The function of that dotted name: the longest importable module, then attributes; a builtin
    where there is no dot."""
    parts = qualified.split(".")
    if len(parts) == 1:
        return getattr(builtins, qualified)
    found: Any = torch if parts[0] == "torch" else importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[: i + 1]))
        found = getattr(found, part)
    return found
