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

from liger_fx.engine.edits import Rewrite
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage import expressions, leaf_calls
from liger_fx.storage.checks import (
    LIST,
    NUMBER,
    OBJECT,
    STRING,
    expect,
    fields,
    identifier,
    module_path,
    strings,
)
from liger_fx.storage.expressions import SizeNames
from liger_fx.storage.json_file import shown
from liger_fx.storage.leaf_calls import Reference
from liger_fx.storage.sources import read_source, write_source
from liger_fx.storage.targets import ENTER_AUTOCAST, FUNCTIONS, METHODS, name_of
from liger_fx.storage.values import Devices, decode, dtype_name, encode, read_dtype
from liger_fx.tracing.trace import TensorSpec

_REQUIRED = {"name": STRING, "op": STRING, "target": STRING}
_OPTIONAL = {
    "args": LIST, "kwargs": OBJECT, "spec": LIST, "device": STRING, "module": STRING,
    "source": LIST, "rewrite": OBJECT,
}  # fmt: skip
_REWRITE = {"rule": STRING, "replaced": LIST, "site": NUMBER}


def encode_nodes(
    graph: fx.Graph, sizes: SizeNames, device: torch.device | None
) -> list[dict[str, Any]]:
    """Every node in order; ``device`` is the one that is not written down for each tensor."""
    return [_encode_node(node, sizes, device) for node in graph.nodes]


def _encode_node(node: fx.Node, sizes: SizeNames, device: torch.device | None) -> dict[str, Any]:
    target: Any = node.target
    name = target if isinstance(target, str) else name_of(target)
    if name is None or (node.op == "call_method" and name not in METHODS):
        raise SaveError(
            f"A saved graph may not call {torch.typename(target) if name is None else name} "
            f"(node {node.name}); liger_fx/storage/targets.py lists what it may."
        )
    record: dict[str, Any] = {"name": node.name, "op": node.op, "target": name}
    if node.args:
        record["args"] = [encode(arg) for arg in node.args]
    if node.kwargs:
        record["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
    spec: TensorSpec | None = node.meta.get("spec")
    if spec is not None:
        record["spec"] = [dtype_name(spec.dtype), *map(sizes.write, spec.shape)]
        if spec.device != device:
            record["device"] = str(spec.device)
    if node.meta.get("module"):
        record["module"] = node.meta["module"]
    if node.meta.get("source"):
        record["source"] = write_source(node.meta["source"])
    rewrite: Rewrite | None = node.meta.get("rewrite")
    if rewrite is not None:
        record["rewrite"] = {
            "rule": rewrite.rule, "replaced": list(rewrite.replaced), "site": rewrite.site,
        }  # fmt: skip
    return record


class GraphReader:
    """Reads the nodes of one graph; ``references`` are the names it looks up when it runs."""

    def __init__(self, devices: Devices, device: torch.device | None) -> None:
        self.devices, self.device = devices, device
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.references: list[Reference] = []

    def read(self, records: list[Any]) -> fx.Graph:
        """The graph of these records; LoadError, naming the node, for the first that is wrong."""
        for i, record in enumerate(records):
            try:
                self._add(record)
            except LoadError as error:
                name = record.get("name") if type(record) is dict else None
                place = f"nodes[{i}]" if type(name) is not str else f"nodes[{i}] ({shown(name)})"
                raise error.inside(place) from None
        ops = [record["op"] for record in records]
        if ops.count("output") != 1 or ops[-1] != "output":
            raise LoadError("the last node, and no other, must be the output", "nodes")
        inputs = ops.count("placeholder")
        if "placeholder" in ops[inputs:]:
            raise LoadError("the placeholders must come first", "nodes")
        return self.graph

    def _add(self, record: Any) -> None:
        fields(record, _REQUIRED, _OPTIONAL)
        name, op = identifier(record["name"], "name"), record["op"]
        if name in self.nodes or name == "self":
            raise LoadError(f"{name} is taken by another node", "name")
        target = self._target(op, record["target"])
        args = tuple(self._values(record.get("args", []), "args"))
        kwargs = self._keywords(record.get("kwargs", {}))
        if op in ("placeholder", "get_attr") and (args or kwargs):
            raise LoadError(f"a {op} takes none", "args")
        if op == "call_method" and not (args and isinstance(args[0], fx.Node)):
            raise LoadError("a method is called on no node", "args")
        if op == "output" and (len(args) != 1 or kwargs):
            raise LoadError("the output has one value", "args")
        if op == "call_function":
            reference = leaf_calls.check(name, target, args, kwargs)
            if reference is not None:
                self.references.append(reference)
            args = self._moved_autocast(target, args)
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise LoadError(f"{name} is no name for a node", "name")
        self.nodes[name] = node
        self._read_meta(node, record)

    def _target(self, op: str, target: str) -> Any:
        if op == "call_function":
            if target not in FUNCTIONS:
                raise LoadError(f"{shown(target)} may not be called by a saved graph", "target")
            return FUNCTIONS[target]
        if op == "call_method" and target not in METHODS:
            raise LoadError(f"{shown(target)} may not be called by a saved graph", "target")
        if op in ("call_module", "get_attr"):
            return module_path(target, "target")
        if op not in ("call_method", "placeholder", "output"):
            raise LoadError(f"{shown(op)} is no operation", "op")
        if op == "placeholder" and target == "self":  # an argument beside the model itself
            raise LoadError("'self' is no name", "target")
        return identifier(target, "target")

    def _values(self, values: list[Any], place: str) -> list[Any]:
        found = []
        for i, value in enumerate(values):
            try:
                found.append(decode(value, self.nodes, self.devices))
            except LoadError as error:
                raise error.inside(f"{place}[{i}]") from None
        return found

    def _keywords(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            try:
                found[identifier(key, "")] = decode(value, self.nodes, self.devices)
            except LoadError as error:
                raise error.inside(f"kwargs.{shown(key)}") from None
        return found

    def _moved_autocast(self, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if target is not ENTER_AUTOCAST:
            return args
        device_type = self.devices.type_for(args[0])
        if args[2] and device_type != args[0]:
            raise LoadError(f"its autocast region is for {args[0]}, so it cannot move", "args[0]")
        return (device_type, *args[1:])

    def _read_meta(self, node: fx.Node, record: dict[str, Any]) -> None:
        meta = node.meta
        meta["module"] = module_path(record.get("module", ""), "module", root=True)
        meta["source"] = read_source(record["source"]) if "source" in record else None
        if "spec" in record:
            meta["spec"] = self._spec(record)
        if "rewrite" in record:
            rewrite = record["rewrite"]
            try:
                fields(rewrite, _REWRITE)
                replaced = tuple(strings(rewrite["replaced"], "replaced"))
            except LoadError as error:
                raise error.inside("rewrite") from None
            meta["rewrite"] = Rewrite(rewrite["rule"], replaced, rewrite["site"])

    def _spec(self, record: dict[str, Any]) -> TensorSpec:
        spec, device = record["spec"], self.device
        if not spec:
            raise LoadError("has no dtype", "spec")
        try:
            dtype = read_dtype(expect(spec[0], STRING))
            shape = tuple(map(expressions.read, spec[1:]))
        except LoadError as error:
            raise error.inside("spec") from None
        if "device" in record:
            device = self.devices.read(record["device"], "device")
        if device is None:
            raise LoadError("is missing", "device")
        return TensorSpec(shape, dtype, device)
