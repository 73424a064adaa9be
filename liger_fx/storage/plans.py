"""A plan as a JSON object and back: the guards of its graph, the modules it follows, its nodes.

   Plan(guards: input_ids int64[batch, sequence] on cpu, eval mode, ...; graph: ...)
<->
   {"guards": {"inputs": {"input_ids": {"sizes": ["batch", "sequence"], ...}}, ...},
    "followed": ["", "model", ...], "opaque": [], "nodes": [...]}
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from liger_fx.errors import LoadError
from liger_fx.plan import Plan
from liger_fx.storage import expressions
from liger_fx.storage.checks import (
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    OPTIONAL_LIST,
    STRING,
    expect,
    fields,
    identifier,
    inside,
    module_path,
    strings,
)
from liger_fx.storage.expressions import SizeNames
from liger_fx.storage.json_file import shown
from liger_fx.storage.leaf_calls import Reference
from liger_fx.storage.nodes import GraphReader, encode_nodes
from liger_fx.storage.sources import read_source, write_source
from liger_fx.storage.values import Devices, decode, dtype_name, encode, read_dtype
from liger_fx.tracing.call import PLAIN, CallSpec, InputSpec
from liger_fx.tracing.guards import Guards
from liger_fx.tracing.trace import OpaqueLeaf

_PLAN = {"guards": OBJECT, "followed": LIST, "opaque": LIST, "nodes": LIST}
_GUARDS = {
    "inputs": OBJECT, "constants": OBJECT, "hints": OBJECT, "sizes": LIST, "training": FLAG,
    "grad_enabled": FLAG, "autocast": OBJECT, "attention_fixed": FLAG,
}  # fmt: skip
_INPUT = {"sizes": LIST, "dtype": STRING, "device": STRING}
_OPAQUE = {"path": STRING, "class": STRING, "reason": STRING, "source": OPTIONAL_LIST}
# Names that the check of the inputs uses itself.
_RESERVED = {
    "min", "max", "abs", "round", "math", "floor", "ceil", "trunc", "arguments", "constants",
}  # fmt: skip


@dataclass(frozen=True)
class SavedPlan:
    """A plan as it was read: everything of a Plan but what belongs to the tree it will run in."""

    graph: fx.Graph
    guards: Guards
    followed: list[str]
    opaque: list[OpaqueLeaf]
    references: list[Reference]


def encode_plan(plan: Plan, device: torch.device | None) -> dict[str, Any]:
    """``device``: the one that the file names once; SaveError for what has no form in a file."""
    call = plan.guards.call
    sizes = SizeNames(plan.graph, {name: spec.sizes for name, spec in call.tensors.items()})
    return {
        "guards": _encode_guards(plan.guards),
        "followed": list(plan.paths),
        "opaque": [
            {
                "path": leaf.path,
                "class": leaf.class_name,
                "reason": leaf.reason,
                "source": leaf.source and write_source(leaf.source),
            }
            for leaf in plan.opaque
        ],
        "nodes": encode_nodes(plan.graph, sizes, device),
    }


def _encode_guards(guards: Guards) -> dict[str, Any]:
    call = guards.call
    inputs = {
        name: {
            "sizes": list(spec.sizes),
            "dtype": dtype_name(spec.dtype),
            "device": str(spec.device),
        }
        for name, spec in call.tensors.items()
    }
    autocast = {kind: dtype and dtype_name(dtype) for kind, dtype in guards.autocast.items()}
    return {
        "inputs": inputs,
        "constants": {name: encode(value) for name, value in call.constants.items()},
        "hints": dict(call.hints),
        "sizes": list(guards.sizes),
        "training": guards.training,
        "grad_enabled": guards.grad_enabled,
        "autocast": autocast,
        "attention_fixed": guards.attention_fixed,
    }


def read_plan(record: Any, devices: Devices, device: torch.device | None) -> SavedPlan:
    """The plan that ``encode_plan`` wrote; LoadError, naming node or field, if it is none."""
    fields(record, _PLAN)
    with inside("guards"):
        guards = _read_guards(record["guards"], devices)
    followed = [
        module_path(path, f"followed[{i}]", root=True)
        for i, path in enumerate(strings(record["followed"], "followed"))
    ]
    opaque = [_read_opaque(leaf, f"opaque[{i}]") for i, leaf in enumerate(record["opaque"])]
    reader = GraphReader(devices, device)
    graph = reader.read(record["nodes"])
    inputs = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    if sorted(inputs) != sorted(guards.call.tensors):
        raise LoadError("are not the inputs that the guards name", "nodes")
    return SavedPlan(graph, guards, followed, opaque, reader.references)


def _read_guards(record: Any, devices: Devices) -> Guards:
    fields(record, _GUARDS)
    tensors = {
        identifier(name, "inputs"): _read_input(spec, f"inputs.{name}", devices)
        for name, spec in record["inputs"].items()
    }
    both = sorted(tensors.keys() & record["constants"].keys())
    if both:
        raise LoadError(f"{shown(both[0])} is an input, too", "constants")
    names = {size for spec in tensors.values() for size in spec.sizes if isinstance(size, str)}
    for size, hint in record["hints"].items():
        if size not in names or type(hint) is not int or hint < 0:
            raise LoadError(f"{shown(size)}: {shown(hint)} is no example of a size", "hints")
    for i, guard in enumerate(strings(record["sizes"], "sizes")):
        with inside(f"sizes[{i}]"):
            expressions.check(guard, names)
    return Guards(
        CallSpec(tensors, _read_constants(record["constants"], devices), dict(record["hints"])),
        tuple(record["sizes"]),
        record["training"],
        record["grad_enabled"],
        _read_autocast(record["autocast"], devices),
        record["attention_fixed"],
    )


def _read_input(record: Any, place: str, devices: Devices) -> InputSpec:
    with inside(place):
        fields(record, _INPUT)
        for i, size in enumerate(record["sizes"]):
            if type(size) is str:
                if identifier(size, f"sizes[{i}]") in _RESERVED:
                    raise LoadError(f"{shown(size)} is no name for a size", f"sizes[{i}]")
            elif expect(size, NUMBER, f"sizes[{i}]") < 0:
                raise LoadError(f"{size} is no size", f"sizes[{i}]")
        dtype = read_dtype(record["dtype"], "dtype")
        return InputSpec(tuple(record["sizes"]), dtype, devices.read(record["device"], "device"))


def _read_constants(record: dict[str, Any], devices: Devices) -> dict[str, Any]:
    found = {}
    for name, value in record.items():
        with inside(f"constants.{shown(name)}"):
            found[identifier(name, "")] = constant = decode(value, {}, devices)
            if not isinstance(constant, PLAIN):
                raise LoadError(f"{shown(value)} is no plain argument of a call")
    return found


def check_arguments(guards: Guards, forward: Any) -> None:
    """LoadError for an input or a constant that the model's ``forward`` does not take."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters}
    for place, names in (("inputs", guards.call.tensors), ("constants", guards.call.constants)):
        for name in names:
            if name not in known:
                raise LoadError(f"the model's forward takes no {shown(name)}", f"guards.{place}")


def _read_autocast(record: dict[str, Any], devices: Devices) -> dict[str, torch.dtype | None]:
    with inside("autocast"):
        for kind in record:
            if ":" in kind or Devices().read(kind).type == "meta":
                raise LoadError(f"{shown(kind)} is no type of device")
        return {
            devices.type_for("meta" if devices.from_meta else kind): dtype and read_dtype(dtype)
            for kind, dtype in record.items()
        }


def _read_opaque(record: Any, place: str) -> OpaqueLeaf:
    with inside(place):
        fields(record, _OPAQUE)
        expect(record["source"], OPTIONAL_LIST)
        source = read_source(record["source"]) if record["source"] is not None else None
        path = module_path(record["path"], "path")
        return OpaqueLeaf(path, record["class"], record["reason"], source)
