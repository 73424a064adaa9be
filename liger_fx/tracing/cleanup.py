"""Drops what a trace wrote down and nothing reads: sizes, parameters and results that lead
nowhere."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from liger_fx.tracing.effects import draws_random_numbers, is_effectful


def erase_unread_nodes(graph: fx.Graph, root: nn.Module, needed: Collection[str] = ()) -> int:
    """Erase, in reverse order, nodes without readers and without effects; return how many went.

    ``needed`` are paths of modules whose calls stay.
    """
    erased = 0
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if is_effectful(node, root) or draws_random_numbers(node):
            continue
        if node.op == "call_module" and (
            node.target in needed or root.get_submodule(str(node.target)).training
        ):
            continue  # dropout and its like draw random numbers
        graph.erase_node(node)
        erased += 1
    return erased
