"""Which tensors a graph writes into, and where: by the memory that views and aliases share.

view = h.view(..); h.add_(1); y = view.cos()   ->   add_ writes into the memory of h and view
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from functools import cached_property

import torch
from torch import fx

from liger_fx.engine.facts import Facts
from liger_fx.engine.memory import Memory
from liger_fx.tracing.effects import is_region_boundary


class Writes:
    """The in-place operations of a graph whose nodes ``facts`` knows."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self._memory = facts, Memory(facts.root)
        self._storage: dict[fx.Node, Hashable] = {}

    def after(self, value: fx.Node, place: fx.Node) -> fx.Node | None:
        """The first node after ``place`` that writes into the memory of ``value``."""
        position = self.facts.position
        if not self._by_storage:
            return None
        later = (n for n in self._by_storage.get(self.storage(value), ()) if n in position)
        return next((node for node in later if position[node] > position[place]), None)

    def records_gradients(self, place: fx.Node) -> bool:
        """Whether grad mode is on at that node."""
        on = self.facts.trace.guards.grad_enabled is not False
        for node, position in self.facts.effects.items():
            if position > self.facts.position[place]:
                break
            if node.target is torch._C._set_grad_enabled:
                on = bool(node.args[0])
        return on

    def storage(self, value: fx.Node) -> Hashable:
        """What stands for the memory that a value lies in: a node, or the path of a parameter.

        What may or may not copy (``reshape``, ``dropout``) is taken not to.
        """
        through: list[fx.Node] = []
        while value not in self._storage:
            through.append(value)
            source = written(value, self.facts)[:1] or value.all_input_nodes[:1]
            shares = value in self.facts.effects or self._memory.is_view(value)
            if not source or not (shares or self._memory.operator(value) == "dropout"):
                self._storage[value] = value.target if value.op == "get_attr" else value
            else:
                value = source[0]
        found = self._storage[value]
        self._storage.update(dict.fromkeys(through, found))
        return found

    @cached_property
    def _by_storage(self) -> dict[Hashable, list[fx.Node]]:
        found = defaultdict[Hashable, list[fx.Node]](list)
        for node in filter(self.facts.position.__contains__, self.facts.effects):
            for value in written(node, self.facts):
                found[self.storage(value)].append(node)
        return found


def written(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """The values that a node writes into; the views and aliases of them change as well."""
    if node not in facts.effects or is_region_boundary(node):
        return []
    values = node.kwargs["out"] if "out" in node.kwargs else node.args[:1]
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found or node.all_input_nodes[:1]
