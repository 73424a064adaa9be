"""Blocks and their plans as records and back: guards, followed modules, nodes and sites.

   layers.0-31: [Plan(guards: hidden_states float32[batch, sequence, 64], ...; graph: ...)]
<->
   {"paths": ["model.layers.0", ...], "plans": [{"guards": {"arguments": ...}, "nodes": [...]}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from liger_fx.codec import inside, shown
from liger_fx.engine.site import Site
from liger_fx.errors import LoadError
from liger_fx.model.plan import Plan
from liger_fx.storage.calls import guards_record, read_guards
from liger_fx.storage.expressions import SizeNames
from liger_fx.storage.leaf_calls import Reference
from liger_fx.storage.nodes import GraphReader, encode_nodes
from liger_fx.storage.records import BlockRecord, OpaqueRecord, PlanRecord
from liger_fx.storage.sources import located, portable, write_source
from liger_fx.storage.values import Devices
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
    read: dict[str, tuple[str, ...]]
    sites: tuple[Site, ...]
    operators: dict[str, int] | None

    def plan(self) -> Plan:
        """The plan, which holds for no call before ``assume``."""
        return Plan.restored(
            self.graph,
            self.guards,
            self.opaque,
            self.followed,
            self.read,
            self.sites,
            self.operators,
        )


@dataclass(frozen=True)
class SavedBlock:
    """Alike blocks as they were read."""

    paths: list[str]
    attributes: list[str]
    plans: list[SavedPlan]


def plan_record(
    plan: Plan, device: torch.device | None, numbers: Mapping[str, Mapping[int, int]]
) -> PlanRecord:
    """``device``: the one that the file names once; ``numbers``: those that the plans of the blocks
    inside get. SaveError for what has no form in a file."""
    call = plan.guards.call
    sizes = SizeNames(plan.graph, {name: spec.sizes for name, spec in call.tensors.items()})
    opaque = [
        OpaqueRecord(o.path, o.class_name, o.reason, write_source(o.source) if o.source else None)
        for o in plan.opaque
    ]
    nodes = encode_nodes(plan.graph, sizes, device, numbers)
    sites = [portable(site) for site in plan.sites]
    guards = guards_record(plan.guards)
    read = {path: list(names) for path, names in plan.read.items() if names}
    return PlanRecord(guards, list(plan.paths), opaque, nodes, read, sites, plan.operators)


def read_block(record: BlockRecord, devices: Devices, device: torch.device) -> SavedBlock:
    """The blocks that were described; LoadError, naming node or field, if they are none."""
    plans = []
    for i, plan in enumerate(record.plans):
        with inside(f"plans[{i}]"):
            plans.append(_read_plan(plan, devices, device))
    return SavedBlock(record.paths, record.attributes, plans)


def _read_plan(record: PlanRecord, devices: Devices, device: torch.device) -> SavedPlan:
    with inside("guards"):
        guards = read_guards(record.guards, devices)
    reader = GraphReader(devices, device)
    graph = reader.read(record.nodes)
    inputs = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    if inputs != [name for name, _ in guards.call.leaves()]:
        raise LoadError("are not the inputs that the guards name", "nodes")
    with inside("nodes"):
        _check_sites(graph, record.sites)
    opaque = [OpaqueLeaf(o.path, o.class_, o.reason, o.source) for o in record.opaque]
    sites = tuple(map(located, record.sites))
    read = {path: tuple(names) for path, names in record.read.items()}
    return SavedPlan(
        graph, guards, record.followed, opaque, reader.references, read, sites, record.operators
    )


def _check_sites(graph: fx.Graph, sites: list[Site]) -> None:
    """A node that a rule made names one of the plan's sites, of the same rule."""
    for i, node in enumerate(graph.nodes):
        made = node.meta.get("rewrite")
        if made is None:
            continue
        if not 0 <= made.site < len(sites) or sites[made.site].rule != made.rule:
            place = f"[{i}] ({shown(node.name)}).rewrite.site"
            raise LoadError(f"the plan has no site {made.site} of {shown(made.rule)}", place)
