"""One site run by itself: the nodes that were replaced, or those that stand there now.

values that arrived   ->   replaced nodes, with the model's weights   ->   Run
                      ->   the named module                           ->   Run
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from liger_fx.verification.measure import Run, Tensors, floating
from liger_fx.verification.pairing import Pair, between

Values = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A rewritten site, and in `inner` the traced nodes that compute its results."""

    pair: Pair
    inner: list[fx.Node]

    @classmethod
    def of(cls, pair: Pair) -> Place:
        """The place of a pair in the traced graph."""
        return cls(pair, between(pair.inputs.values(), pair.results.values()))

    def read(self) -> set[fx.Node]:
        """The traced nodes whose values the site needs from outside, the tree's own aside."""
        outside = {node for n in self.inner for node in n.all_input_nodes} - set(self.inner)
        return {n for n in outside if n.op != "get_attr"} | set(self.pair.inputs.values())

    @property
    def passed(self) -> set[str]:
        """The paths of the parameters that the new nodes pass to the named module."""
        return {str(node.target) for node in self.pair.new if node.op == "get_attr"}

    def parameters(self, tree: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters below `tree` that the replaced nodes use, by path."""
        given = set(self.pair.inputs.values())
        paths: dict[str, None] = {}
        for node in self.inner:
            own = [n for n in node.all_input_nodes if n.op == "get_attr" and n not in given]
            paths |= {str(n.target): None for n in own}
            if node.op == "call_module":
                leaf = tree.get_submodule(str(node.target))
                paths |= {f"{node.target}.{name}": None for name, _ in leaf.named_parameters()}
        found = {path: attribute(tree, path) for path in paths}
        return {path: p for path, p in found.items() if isinstance(p, nn.Parameter)}

    def run_replaced(self, tree: nn.Module, parameters: Tensors, values: Values) -> Run:
        """The replaced nodes on `values` of traced nodes by name, with the weights of `tree`."""
        leaves, given = self._leaves(values)
        env = _evaluate(self.inner, lambda path: attribute(tree, path), {**values, **given})
        results = [env[node.name] for node in self.pair.results.values()]
        return self._run(results, parameters, leaves)

    def run_module(
        self, module: nn.Module, tree: nn.Module, parameters: Tensors, values: Values
    ) -> Run:
        """The new nodes on the same values, with `module` for the named one, and the weights of
        `tree` where they pass one to it."""
        leaves, given = self._leaves(values)
        passed = self.passed

        def at(path: str) -> Any:
            return attribute(tree, path) if path in passed else module

        env = {name: given.get(n.name, values[n.name]) for name, n in self.pair.inputs.items()}
        env = _evaluate(self.pair.new, at, env)
        results = [env[name] for name in self.pair.results]
        return self._run(results, parameters, leaves)

    def _leaves(self, values: Values) -> tuple[Values, Values]:
        """Fresh copies of the inputs to take gradients of, and what the nodes are given."""
        names = dict.fromkeys(node.name for node in self.pair.inputs.values())
        leaves = {name: _leaf(values[name]) for name in names if torch.is_tensor(values[name])}
        # a module may work in place on what it is given, which a leaf would not allow
        return leaves, {name: leaf.clone() for name, leaf in leaves.items()}

    def _run(self, results: Any, parameters: Tensors, leaves: Values) -> Run:
        inputs = {f"input {name}": leaf for name, leaf in leaves.items()}
        return Run.of(floating(results), {**inputs, **parameters})


def _evaluate(nodes: Iterable[fx.Node], attribute_at: Any, values: Mapping[str, Any]) -> Values:
    """The values of `nodes` added to those given; attributes and modules come from their path."""
    env = dict(values)

    def value(node: fx.Node) -> Any:
        return env[node.name] if node.name in env else attribute_at(str(node.target))

    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if node.op == "call_module":
            env[node.name] = attribute_at(str(node.target))(*args, **kwargs)
        elif node.op == "get_attr":
            env[node.name] = attribute_at(str(node.target))
        elif node.op == "call_method":
            env[node.name] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
    return env


def attribute(tree: nn.Module, path: str) -> Any:
    """What stands at a dotted path below `tree`."""
    return functools.reduce(getattr, path.split("."), tree)


class Capture(fx.Interpreter):
    """Runs a traced graph and keeps copies of some nodes' values, before anything changes them."""

    def __init__(self, root: nn.Module, graph: fx.Graph, wanted: set[fx.Node]) -> None:
        super().__init__(root, graph=graph)
        self.wanted = wanted
        self.kept: Values = {}

    def values_for(self, inputs: tuple[Any, ...]) -> Values:
        """The wanted nodes' values, by name, in a call with these inputs."""
        self.run(*inputs)
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        """One node of the graph."""
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n.name] = pytree.tree_map_only(torch.Tensor, _leaf, value)
        return value


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that asks for a gradient if the tensor does."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
