"""A saved directory as it was read: every file checked, no model built, no weights read yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liger_fx.codec import decode, expect, inside, shown
from liger_fx.errors import LoadError
from liger_fx.report import GraphDiff
from liger_fx.report.json_face import from_data
from liger_fx.storage import config, named_modules, weights
from liger_fx.storage.files import (
    BUFFERS,
    CONFIG,
    FORMAT,
    GENERATION_CONFIG,
    GRAPH,
    REPORT,
    read_file,
)
from liger_fx.storage.json_file import CONFIG_BYTES, REPORT_BYTES, parse
from liger_fx.storage.plans import SavedBlock, SavedPlan, read_block
from liger_fx.storage.records import SCHEMA, Document
from liger_fx.storage.stored import Stored
from liger_fx.storage.values import FORMS, Devices
from liger_fx.storage.weights import Tensor


@dataclass(frozen=True)
class Saved:
    """The files of one directory.

    device: where the graph is to run. blocks: alike ones with their graphs.
    config, generation: the objects in their JSON files, None where there is none.
    checkpoint: None for a graph saved without weights. constants: the tensors of the model's code.
    report: None for a plain trace.
    """

    document: Document
    device: torch.device
    tensors: list[Tensor]
    blocks: list[SavedBlock]
    config: dict[str, Any] | None
    generation: dict[str, Any] | None
    checkpoint: Stored | None
    constants: Stored
    report: GraphDiff | None

    @property
    def plans(self) -> list[SavedPlan]:
        """The graphs of all blocks."""
        return [plan for block in self.blocks for plan in block.plans]


def read_saved(
    folder: Path, device: torch.device | None = None, *, checkpoint: bool = True
) -> Saved:
    """Everything but the tensors themselves; LoadError, naming file and field, if it is damaged.

    checkpoint: whether to look into the model's weights, if they were saved.
    """
    if not (folder / GRAPH).is_file():
        raise LoadError("there is no saved graph (graph.json)", str(folder))
    with inside(GRAPH):
        found = read_document(parse(read_file(folder / GRAPH)))
        if device is None:  # a graph made of a model without weights is for the CPU
            device = torch.device("cpu") if found.device.type == "meta" else found.device
        tensors = weights.from_records(found.tensors)
        blocks = _read_blocks(found, device)
    raw = generation = None
    kind = found.model.model_type
    if kind is not None:
        with inside(CONFIG):
            raw = config.check_config(parse(read_file(folder / CONFIG), CONFIG_BYTES))
            if raw["model_type"] != kind:
                raise LoadError(f"is no {kind}", "model_type")
        with inside(f"{GRAPH}.implementations"):
            config.check_parts(found.implementations, kind)
    if (folder / GENERATION_CONFIG).exists():
        with inside(GENERATION_CONFIG):
            generation = parse(read_file(folder / GENERATION_CONFIG), CONFIG_BYTES)
            config.check_plain(generation)
    stored = Stored.in_checkpoint(folder) if checkpoint and found.weights else None
    if stored is not None:
        stored.check([t for t in tensors if t.in_checkpoint], exact=True)
    made = [t for t in tensors if not t.in_checkpoint and found.device.type != "meta"]
    constants = Stored.in_files([folder / BUFFERS] if made else [])
    constants.check(made, exact=True)
    report = None
    if found.selection is not None:
        with inside(REPORT):
            raw_report = parse(read_file(folder / REPORT), REPORT_BYTES)
            report = from_data(raw_report, GraphDiff)
    return Saved(found, device, tensors, blocks, raw, generation, stored, constants, report)


def _read_blocks(found: Document, device: torch.device) -> list[SavedBlock]:
    devices = Devices.from_to(found.device, device)
    blocks = []
    for i, record in enumerate(found.blocks):
        with inside(f"blocks[{i}]"):
            blocks.append(read_block(record, devices, device))
    _check_inner_plans(blocks)
    return blocks


def _check_inner_plans(blocks: list[SavedBlock]) -> None:
    """A call of a block names one of its plans."""
    counts = {path: len(block.plans) for block in blocks for path in block.paths}
    if "" not in counts or not any(counts.values()):
        raise LoadError("there is no graph", "blocks")
    for i, block in enumerate(blocks):
        for j, plan in enumerate(block.plans):
            for node in plan.graph.nodes:
                number = node.meta.get("plan")
                inner = [f"{path}.{node.target}".lstrip(".") for path in block.paths]
                calls = node.op == "call_module" and any(path in counts for path in inner)
                if number is None and not calls:
                    continue
                place = f"blocks[{i}].plans[{j}].nodes ({shown(node.name)}).plan"
                if number is None:
                    raise LoadError(f"is missing for {shown(inner[0])}, a block", place)
                if not calls or not all(0 <= number < counts.get(path, 0) for path in inner):
                    raise LoadError(f"{number} is no plan of {shown(inner[0])}", place)


def read_document(raw: Any) -> Document:
    """The document of a parsed graph.json; the nodes of its graphs are read later.

    LoadError, naming the field, for the first thing that is wrong.
    """
    _check_schema(raw)
    found: Document = decode(Document, raw, FORMS)
    for i, record in enumerate(found.named_modules):
        with inside(f"named_modules[{i}]"):
            named_modules.check(record)
    _check_once("modules", ([path] for path, *_ in found.modules))
    _check_once("tensors", ([record.path] for record in found.tensors))
    _check_once("blocks", (record.paths for record in found.blocks))
    _check_once("named_modules", ([record.path, *record.also] for record in found.named_modules))
    _check_paths(found)
    return found


def _check_schema(raw: Any) -> None:
    expect(raw, dict)
    if raw.get("format") != FORMAT:
        raise LoadError(f"is {shown(raw.get('format'))}, not {FORMAT!r}", "format")
    schema = raw.get("schema")
    if type(schema) is not int or schema < 1:
        raise LoadError(f"{shown(schema)} is no version of the format", "schema")
    if schema < SCHEMA:
        raise LoadError(f"is {schema}, which liger_fx 0.1 reads; this one reads {SCHEMA}", "schema")
    if schema > SCHEMA:
        raise LoadError(f"is {schema}, of a later liger_fx; this one reads {SCHEMA}", "schema")


def _check_once(field: str, paths: Iterable[list[str]]) -> None:
    seen: set[str] = set()
    for i, of_record in enumerate(paths):
        for path in of_record:
            if path in seen:
                raise LoadError(f"{shown(path)} is described twice", f"{field}[{i}]")
            seen.add(path)


def _check_paths(found: Document) -> None:
    """What is said of modules is said of those that the file lists."""
    ours = {path for path, *_ in found.modules}
    for i, block in enumerate(found.blocks):
        for j, path in enumerate(block.paths):
            if path not in ours:
                raise LoadError(f"there is no module {path}", f"blocks[{i}].paths[{j}]")
        for j, plan in enumerate(block.plans):
            for k, inner in enumerate(plan.followed):
                path = f"{block.paths[0]}.{inner}".strip(".")
                if path not in ours:
                    place = f"blocks[{i}].plans[{j}].followed[{k}]"
                    raise LoadError(f"there is no module {path}", place)
    for record in found.named_modules:
        ours |= {record.path, *record.also}
    for i, path in enumerate(found.other_modes):
        if path not in ours:
            raise LoadError(f"there is no module {path}", f"other_modes[{i}]")
