"""One site run by itself: the nodes that were replaced, or the module that stands there now.

    values that arrived   ->   replaced nodes on the traced tree   ->   Run
                          ->   the named module                    ->   Run
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from liger_fx.tracing.trace import Trace
from liger_fx.verification.measure import Run, Tensors, floating
from liger_fx.verification.pairing import Pair, between

Values = dict[str, Any]
Compute = Callable[[Values], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Place:
    """A rewritten node, and in `inner` the traced nodes that compute its results."""

    pair: Pair
    inner: list[fx.Node]

    @classmethod
    def of(cls, pair: Pair, traced: fx.Graph) -> Place:
        """The place of a pair in the traced graph."""
        return cls(pair, between(pair.inputs.values(), pair.results, traced))

    def read(self) -> set[fx.Node]:
        """What replaced nodes and module read from outside, the tree's own attributes aside."""
        outside = {node for n in self.inner for node in n.all_input_nodes} - set(self.inner)
        return {n for n in outside if n.op != "get_attr"} | set(self.pair.inputs.values())

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

    def run(self, compute: Compute, parameters: Tensors, values: Mapping[str, Any]) -> Run:
        """Outputs, and gradients with respect to the inputs that ask for one and the parameters."""
        names = [node.name for node in self.pair.inputs.values()]
        leaves = {name: _leaf(values[name]) for name in names if torch.is_tensor(values[name])}
        # a module may work in place on what it is given, which a leaf would not allow
        given = {**values, **{name: leaf.clone() for name, leaf in leaves.items()}}
        inputs = {f"input {i}": leaf for i, leaf in enumerate(leaves.values())}
        return Run.of(floating(compute(given)), {**inputs, **parameters})

    def replaced(self, tree: nn.Module, values: Values) -> tuple[torch.Tensor, ...]:
        """The results as the traced nodes compute them from `values`, with weights of `tree`."""
        env = dict(values)

        def value(node: fx.Node) -> Any:
            return env[node.name] if node.name in env else attribute(tree, str(node.target))

        for node in self.inner:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            env[node.name] = _call(node, tree, args, kwargs)
        return tuple(env[node.name] for node in self.pair.results)

    def rewritten(self, module: nn.Module, values: Values) -> tuple[torch.Tensor, ...]:
        """The results as the named module computes them from `values`."""
        new, places = self.pair.new, self.pair.places
        args, kwargs = map_arg(
            (new.args, new.kwargs), lambda node: values[self.pair.inputs[node.name].name]
        )
        result = module(*args, **kwargs)
        return tuple(result[place] for place in places) if places else (result,)


def _call(node: fx.Node, tree: nn.Module, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return tree.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def attribute(tree: nn.Module, path: str) -> Any:
    """What stands at a dotted path below `tree`."""
    return functools.reduce(getattr, path.split("."), tree)


class Capture(fx.Interpreter):
    """Runs a traced graph and keeps copies of some nodes' values, before anything changes them."""

    def __init__(self, traced: Trace, wanted: set[fx.Node]) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self.wanted = wanted
        self.kept: Values = {}

    def values_for(self, inputs: Mapping[str, Any]) -> Values:
        """The wanted nodes' values, by name, in a call with these keyword arguments."""
        names = [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]
        self.run(*(inputs[name] for name in names))
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
