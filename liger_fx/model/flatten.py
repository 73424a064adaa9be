"""All blocks of a model as one flat, plain torch.fx.GraphModule.

    model = self.model(input_ids, ...)          (a block)
 ->
    embed = self.model.embed_tokens(input_ids); ...; norm = self.model.layers.0.input_layernorm(...)

Every rewritten site is a call_module node to its named module. The weights are the model's own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from liger_fx.errors import UsageError
from liger_fx.model.block import Block
from liger_fx.model.build import build
from liger_fx.model.plan import Plan
from liger_fx.model.planner import Planner
from liger_fx.model.tree import copy_tree, plain_module
from liger_fx.tracing import leaves
from liger_fx.tracing.call import LEAVES, CallSpec, Items, Spec, named_arguments

_META = ("spec", "source", "rewrite")


def flatten(opt: Block) -> fx.GraphModule:
    """The graph of the first kind of call that ``opt`` was made for, blocks inlined.

    It takes the inputs that this graph takes, by position, and returns what ``opt`` returns; it is
    for that kind of call and checks nothing. UsageError for what ``optimize`` or ``trace`` did not
    make, and where the root itself, or a block that its graph calls, has no graph.
    """
    if not isinstance(opt, Block):
        raise UsageError(f"A {type(opt).__name__} is no result of liger_fx.optimize or trace.")
    opt.graph  # noqa: B018  (says what is missing, if it is)
    plan = opt.plans[0]
    graph = fx.Graph()
    inputs = [
        graph.placeholder(str(node.target)) for node in plan.graph.find_nodes(op="placeholder")
    ]
    output = _Inliner(graph).inline(opt, plan, inputs, "")
    graph.output(output)
    for node in reversed(graph.nodes):
        if node.target is leaves.model_output and not node.users:
            graph.erase_node(node)
    module = fx.GraphModule(opt, graph, class_name=type(opt).__name__)
    return module


class _Inliner:
    """Copies graphs into one."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def inline(self, block: Block, plan: Plan, inputs: list[Any], prefix: str) -> Any:
        """Add the nodes of a block's plan, whose inputs are these; its output, a tree of nodes."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in plan.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = self._copied(block, node, values, prefix)
        raise AssertionError("a graph without an output")

    def _copied(
        self, block: Block, node: fx.Node, values: Mapping[fx.Node, Any], prefix: str
    ) -> Any:
        given: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = given
        if "plan" in node.meta:
            inner: Any = block.get_submodule(str(node.target))
            plan = inner._block.alike.plans[node.meta["plan"]]
            arguments = named_arguments(inner.block_class.forward, args, kwargs)
            inputs = list(self._leaves(plan.guards.call.arguments, arguments))
            return self.inline(inner, plan, inputs, f"{prefix}{node.target}.")
        if node.target is operator.getitem:
            value, key = args
            return self._item(value, key, node)
        target: Any = node.target
        if node.op in ("get_attr", "call_module"):
            found = operator.attrgetter(target)(block)
            if isinstance(found, int):  # what alike blocks do not share is a number here
                return found
            target = prefix + target
        return self._node(node, node.op, target, args, kwargs)

    def _leaves(self, specs: Mapping[str, Spec], arguments: Mapping[str, Any]) -> Iterator[Any]:
        for name, spec in specs.items():
            yield from self._leaves_of(spec, arguments[name])

    def _leaves_of(self, spec: Spec, value: Any) -> Iterator[Any]:
        if isinstance(spec, Items):
            for key, item in spec.places():
                yield from self._leaves_of(item, self._item(value, key, None))
        elif isinstance(spec, LEAVES):
            yield value

    def _item(self, value: Any, key: Any, node: fx.Node | None) -> Any:
        """``value[key]``, without a node where it is known what stands there."""
        if not isinstance(value, fx.Node):
            return value[key]
        if value.target is leaves.model_output and key in value.kwargs:
            return value.kwargs[key]
        return self._node(node, "call_function", operator.getitem, (value, key), {})

    def _node(
        self, origin: fx.Node | None, op: str, target: Any, args: Any, kwargs: Any
    ) -> fx.Node:
        made = self.graph.create_node(op, target, args, kwargs)
        if origin is not None:
            made.meta = {key: origin.meta[key] for key in _META if key in origin.meta}
        return made


def flat_plan(opt: Block, call: CallSpec) -> tuple[Block, Plan]:
    """The same model as one block, traced anew for a call: with the guards of all that is in it.

    What stays the model's own is shared with ``opt``; TraceError as ``optimize`` has it.
    """
    planner = Planner(opt._block.planner.selection)
    root = build(copy_tree(opt, plain_module), [""], planner)
    return root, planner.plan(root, call)[1]
