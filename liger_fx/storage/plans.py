"""A plan as a record and back: the guards of its graph, the modules it follows, its nodes.

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

from liger_fx.codec import inside, shown
from liger_fx.errors import LoadError
from liger_fx.plan import Plan
from liger_fx.storage import expressions
from liger_fx.storage.expressions import SizeNames
from liger_fx.storage.leaf_calls import Reference
from liger_fx.storage.nodes import GraphReader, encode_nodes
from liger_fx.storage.records import GuardsRecord, InputRecord, OpaqueRecord, PlanRecord
from liger_fx.storage.sources import write_source
from liger_fx.storage.values import Devices, ValueReader, encode, read_device
from liger_fx.tracing.call import PLAIN, CallSpec, InputSpec
from liger_fx.tracing.guards import Guards
from liger_fx.tracing.trace import OpaqueLeaf


@dataclass(frozen=True)
class SavedPlan:
    """A plan as it was read: everything of a Plan but what belongs to the tree it will run in."""

    graph: fx.Graph
    guards: Guards
    followed: list[str]
    opaque: list[OpaqueLeaf]
    references: list[Reference]


def plan_record(plan: Plan, device: torch.device | None) -> PlanRecord:
    """``device``: the one that the file names once; SaveError for what has no form in a file."""
    call = plan.guards.call
    sizes = SizeNames(plan.graph, {name: spec.sizes for name, spec in call.tensors.items()})
    opaque = [
        OpaqueRecord(o.path, o.class_name, o.reason, write_source(o.source) if o.source else None)
        for o in plan.opaque
    ]
    nodes = encode_nodes(plan.graph, sizes, device)
    return PlanRecord(_guards_record(plan.guards), list(plan.paths), opaque, nodes)


def _guards_record(guards: Guards) -> GuardsRecord:
    call = guards.call
    return GuardsRecord(
        inputs={
            name: InputRecord(list(spec.sizes), spec.dtype, spec.device)
            for name, spec in call.tensors.items()
        },
        constants={name: encode(value) for name, value in call.constants.items()},
        hints=call.hints,
        sizes=list(guards.sizes),
        training=guards.training,
        grad_enabled=guards.grad_enabled,
        autocast=guards.autocast,
        attention_fixed=guards.attention_fixed,
    )


def read_plan(record: PlanRecord, devices: Devices, device: torch.device) -> SavedPlan:
    """The plan that ``plan_record`` described; LoadError, naming node or field, if it is none."""
    with inside("guards"):
        guards = _read_guards(record.guards, devices)
    reader = GraphReader(devices, device)
    graph = reader.read(record.nodes)
    inputs = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    if sorted(inputs) != sorted(guards.call.tensors):
        raise LoadError("are not the inputs that the guards name", "nodes")
    opaque = [OpaqueLeaf(o.path, o.class_, o.reason, o.source) for o in record.opaque]
    return SavedPlan(graph, guards, record.followed, opaque, reader.references)


def _read_guards(record: GuardsRecord, devices: Devices) -> Guards:
    both = sorted(record.inputs.keys() & record.constants.keys())
    if both:
        raise LoadError(f"{shown(both[0])} is an input, too", "constants")
    sizes = {size for spec in record.inputs.values() for size in spec.sizes}
    names = {size for size in sizes if isinstance(size, str)}
    for size, hint in record.hints.items():
        if size not in names or hint < 0:
            raise LoadError(f"{shown(size)}: {shown(hint)} is no example of a size", "hints")
    for i, guard in enumerate(record.sizes):
        with inside(f"sizes[{i}]"):
            expressions.check(guard, names)
    tensors = {
        name: InputSpec(tuple(spec.sizes), spec.dtype, devices.place_of(spec.device))
        for name, spec in record.inputs.items()
    }
    return Guards(
        CallSpec(tensors, _read_constants(record.constants, devices), record.hints),
        tuple(record.sizes),
        record.training,
        record.grad_enabled,
        _read_autocast(record.autocast, devices),
        record.attention_fixed,
    )


def _read_constants(record: dict[str, Any], devices: Devices) -> dict[str, Any]:
    values = ValueReader({}, devices)
    found = {}
    for name, value in record.items():
        with inside(f"constants.{name}"):
            found[name] = constant = values.read(value)
            if not isinstance(constant, PLAIN):
                raise LoadError(f"{shown(value)} is no plain argument of a call")
    return found


def _read_autocast(
    record: dict[str, torch.dtype | None], devices: Devices
) -> dict[str, torch.dtype | None]:
    with inside("autocast"):
        for kind in record:
            if ":" in kind or read_device(kind).type == "meta":
                raise LoadError(f"{shown(kind)} is no type of device")
    return {
        devices.type_for("meta" if devices.from_meta else kind): dtype
        for kind, dtype in record.items()
    }


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
