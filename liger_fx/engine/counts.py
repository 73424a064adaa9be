"""How often each operator stands in a graph, by the name that reports give it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

_NOT_OPERATORS = {"placeholder", "output", "get_attr"}


def count_operators(graph: fx.Graph, root: nn.Module) -> dict[str, int]:
    """The operators by name; calls of blocks, whose graphs are counted by themselves, left out."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if not isinstance(module, fx.GraphModule):
                counts[type(module).__name__] += 1
        elif node.op not in _NOT_OPERATORS:
            counts[operator_name(node)] += 1
    return dict(sorted(counts.items()))


def operator_name(node: fx.Node) -> str:
    """The name of a function or method: mul, softmax, size; both of one name are one operator."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
