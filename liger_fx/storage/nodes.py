"""A graph as a list of JSON objects, one for each node in order, and back.

    mul = operator.mul(x, 2)
 <->
    {"name": "mul", "op": "call_function", "target": "operator.mul", "args": [{"node": "x"}, 2],
     "spec": ["float32", "batch", "sequence", 56], "module": "model.norm"}

Reading makes nodes of what it has checked, one by one; it imports nothing and calls nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from liger_fx.codec import decode, encode, inside, shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage import expressions, leaf_calls, values
from liger_fx.storage.checks import identifier, module_path
from liger_fx.storage.expressions import SizeNames
from liger_fx.storage.leaf_calls import Reference
from liger_fx.storage.records import NodeRecord
from liger_fx.storage.sources import write_source
from liger_fx.storage.targets import ENTER_AUTOCAST, FUNCTIONS, METHODS, name_of
from liger_fx.storage.values import FORMS, Devices, ValueReader, dtype_name, read_dtype
from liger_fx.tracing.trace import TensorSpec


def encode_nodes(
    graph: fx.Graph,
    sizes: SizeNames,
    device: torch.device | None,
    numbers: Mapping[str, Mapping[int, int]],
) -> list[dict[str, Any]]:
    """Every node in order; ``device`` is the one that is not written down for each tensor,
    ``numbers`` are those of the plans of blocks that it calls."""
    return [encode(_record(node, sizes, device, numbers), FORMS) for node in graph.nodes]


def _record(
    node: fx.Node,
    sizes: SizeNames,
    device: torch.device | None,
    numbers: Mapping[str, Mapping[int, int]],
) -> NodeRecord:
    target: Any = node.target
    name = target if isinstance(target, str) else name_of(target)
    if name is None or (node.op == "call_method" and name not in METHODS):
        raise SaveError(
            f"A saved graph may not call {torch.typename(target) if name is None else name} "
            f"(node {node.name}); liger_fx/storage/targets.py lists what it may."
        )
    spec: TensorSpec | None = node.meta.get("spec")
    source = node.meta.get("source")
    return NodeRecord(
        name=node.name,
        op=node.op,  # type: ignore[arg-type]
        target=name,
        args=[values.encode(arg) for arg in node.args],
        kwargs={key: values.encode(value) for key, value in node.kwargs.items()},
        spec=[dtype_name(spec.dtype), *map(sizes.write, spec.shape)] if spec else [],
        device=spec.device if spec and spec.device != device else None,
        module=node.meta.get("module", ""),
        source=write_source(source) if source else None,
        rewrite=node.meta.get("rewrite"),
        plan=numbers[name][node.meta["plan"]] if "plan" in node.meta else None,
    )


class GraphReader:
    """Reads the nodes of one graph; ``references`` are the names it looks up when it runs."""

    def __init__(self, devices: Devices, device: torch.device) -> None:
        self.devices, self.device = devices, device
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.values = ValueReader(self.nodes, devices)
        self.references: list[Reference] = []

    def read(self, records: list[Any]) -> fx.Graph:
        """The graph of these records; LoadError, naming the node, for the first that is wrong."""
        for i, raw in enumerate(records):
            try:
                self._add(decode(NodeRecord, raw, FORMS))
            except LoadError as error:
                name = raw.get("name") if type(raw) is dict else None
                place = f"nodes[{i}]" if type(name) is not str else f"nodes[{i}] ({shown(name)})"
                raise error.inside(place) from None
        ops = [node.op for node in self.graph.nodes]
        if ops.count("output") != 1 or ops[-1] != "output":
            raise LoadError("the last node, and no other, must be the output", "nodes")
        inputs = ops.count("placeholder")
        if "placeholder" in ops[inputs:]:
            raise LoadError("the placeholders must come first", "nodes")
        return self.graph

    def _add(self, record: NodeRecord) -> None:
        name, op = record.name, record.op
        if name in self.nodes or name == "self":
            raise LoadError(f"{name} is taken by another node", "name")
        with inside("target"):
            target = self._target(op, record.target)
        with inside("args"):
            args = tuple(self.values.read_list(record.args))
            _check_args(op, args, record.kwargs)
        kwargs = self._keywords(record.kwargs)
        if op == "call_function":
            reference = leaf_calls.check(name, target, args, kwargs)
            if reference is not None:
                self.references.append(reference)
            args = self._moved_autocast(target, args)
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise LoadError(f"{name} is no name for a node", "name")
        self.nodes[name] = node
        node.meta |= {"module": record.module, "source": record.source}
        if record.rewrite is not None:
            node.meta["rewrite"] = record.rewrite
        if record.plan is not None:
            node.meta["plan"] = record.plan
        if record.spec:
            node.meta["spec"] = self._spec(record)

    def _target(self, op: str, target: str) -> Any:
        known = {"call_function": FUNCTIONS, "call_method": METHODS}.get(op)
        if known is not None and target not in known:
            raise LoadError(f"{shown(target)} may not be called by a saved graph")
        if op == "call_function":
            return FUNCTIONS[target]
        if op in ("call_module", "get_attr"):
            return module_path(target)
        if op == "placeholder" and target == "self":  # an argument beside the model itself
            raise LoadError("'self' is no name")
        return identifier(target)

    def _keywords(self, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in given.items():
            try:
                found[key] = self.values.read(value)
            except LoadError as error:
                raise error.inside(f"kwargs.{key}") from None
        return found

    def _moved_autocast(self, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if target is not ENTER_AUTOCAST:
            return args
        device_type = self.devices.type_for(args[0])
        if args[2] and device_type != args[0]:
            raise LoadError(f"its autocast region is for {args[0]}, so it cannot move", "args[0]")
        return (device_type, *args[1:])

    def _spec(self, record: NodeRecord) -> TensorSpec:
        dtype, *shape = record.spec
        device = self.device
        if record.device is not None:
            device = self.devices.place_of(record.device)
        with inside("spec"):
            return TensorSpec(tuple(map(expressions.read, shape)), read_dtype(dtype), device)


def _check_args(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if op in ("placeholder", "get_attr") and (args or kwargs):
        raise LoadError(f"a {op} takes none")
    if op == "call_method" and not (args and isinstance(args[0], fx.Node)):
        raise LoadError("a method is called on no node")
    if op == "output" and (len(args) != 1 or kwargs):
        raise LoadError("the output has one value")
