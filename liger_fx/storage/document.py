"""graph.json as a whole: read and checked without building anything.

docs/graph-format.md describes each field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from liger_fx.engine.rule import Selection
from liger_fx.errors import LoadError
from liger_fx.storage import config, fingerprint, named_modules, weights
from liger_fx.storage.checks import (
    FLAG,
    LIST,
    OBJECT,
    OPTIONAL_LIST,
    OPTIONAL_OBJECT,
    OPTIONAL_STRING,
    STRING,
    expect,
    fields,
    inside,
    module_path,
    strings,
)
from liger_fx.storage.json_file import shown
from liger_fx.storage.names import FORMAT
from liger_fx.storage.plans import SavedPlan, read_plan
from liger_fx.storage.values import Devices
from liger_fx.storage.weights import Tensor

SCHEMA = 1
_MAX_PLANS, _MAX_NAMES = 16, 4096
_FIELDS = {
    "format": STRING, "schema": (int,), "model": OBJECT, "fingerprint": OBJECT,
    "device": STRING, "training": FLAG, "other_modes": LIST, "weights": FLAG,
    "selection": OPTIONAL_OBJECT, "implementations": OBJECT, "modules": LIST,
    "named_modules": LIST, "tensors": LIST, "plans": LIST,
}  # fmt: skip
_MODEL = {"class": STRING, "model_type": OPTIONAL_STRING}


@dataclass(frozen=True)
class Document:
    """What graph.json says.

    class_name, model_type: the model's class; no model_type where only a given model can be bound.
    device: where the graph is to run. saved_device: where it was made.
    other_modes: paths of modules whose train mode is not the model's.
    has_weights: whether the weights were saved with it. selection: None for a plain trace.
    """

    class_name: str
    model_type: str | None
    fingerprint: dict[str, Any]
    saved_device: torch.device
    device: torch.device
    training: bool
    other_modes: list[str]
    has_weights: bool
    selection: Selection | None
    implementations: dict[str, Any]
    modules: list[list[Any]]
    named_modules: list[dict[str, Any]]
    tensors: list[Tensor]
    plans: list[SavedPlan] = field(repr=False)


def read(raw: Any, device: torch.device | None = None) -> Document:
    """The document of a parsed graph.json, its graph moved to ``device``, if given.

    LoadError, naming the field or the node, for the first thing that is wrong.
    """
    _check_schema(raw)
    fields(raw, _FIELDS)
    with inside("model"):
        model = fields(raw["model"], _MODEL)
    with inside("fingerprint"):
        fingerprint.check(raw["fingerprint"])
    with inside("implementations"):
        config.check_implementations(raw["implementations"])
    saved = Devices().read(raw["device"], "device")
    if device is None:  # a graph made of a model without weights is for the CPU
        device = torch.device("cpu") if saved.type == "meta" else saved
    devices = _devices(saved, device)
    found = Document(
        class_name=model["class"],
        model_type=model["model_type"],
        fingerprint=raw["fingerprint"],
        saved_device=saved,
        device=device,
        training=raw["training"],
        other_modes=[
            module_path(p, "other_modes") for p in strings(raw["other_modes"], "other_modes")
        ],
        has_weights=raw["weights"],
        selection=_read_selection(raw["selection"]),
        implementations=raw["implementations"],
        modules=_read_modules(raw["modules"]),
        named_modules=_read_named(raw["named_modules"]),
        tensors=weights.decode(raw["tensors"]),
        plans=_read_plans(raw["plans"], devices, device),
    )
    _check_paths(found)
    return found


def _check_paths(found: Document) -> None:
    """What is said of modules is said of those that the file lists."""
    ours = {path for path, *_ in found.modules}
    for i, plan in enumerate(found.plans):
        for j, path in enumerate(plan.followed):
            if path not in ours:
                raise LoadError(f"there is no module {path}", f"plans[{i}].followed[{j}]")
    for record in found.named_modules:
        ours |= {record["path"], *record.get("also", ())}
    for i, path in enumerate(found.other_modes):
        if path not in ours:
            raise LoadError(f"there is no module {path}", f"other_modes[{i}]")


def _check_schema(raw: Any) -> None:
    expect(raw, OBJECT)
    if raw.get("format") != FORMAT:
        raise LoadError(f"is {shown(raw.get('format'))}, not {FORMAT!r}", "format")
    schema = raw.get("schema")
    if type(schema) is not int or schema < 1:
        raise LoadError(f"{shown(schema)} is no version of the format", "schema")
    if schema > SCHEMA:
        raise LoadError(
            f"is {schema}, of a later liger_fx; this one reads versions up to {SCHEMA}", "schema"
        )


def _devices(saved: torch.device, device: torch.device) -> Devices:
    if device == saved:
        return Devices()
    return Devices({saved: device, torch.device(saved.type): device})


def _read_selection(record: Any) -> Selection | None:
    if record is None:
        return None
    with inside("selection"):
        fields(record, {"chosen": OPTIONAL_LIST, "excluded": LIST})
        chosen = None if record["chosen"] is None else tuple(strings(record["chosen"], "chosen"))
        excluded = tuple(strings(record["excluded"], "excluded"))
        if len(excluded) + len(chosen or ()) > _MAX_NAMES:
            raise LoadError(f"has more than {_MAX_NAMES} names")
        return Selection(chosen, excluded)


def _read_modules(records: list[Any]) -> list[list[Any]]:
    seen: set[str] = set()
    for i, record in enumerate(records):
        with inside(f"modules[{i}]"):
            if len(expect(record, LIST)) != 3:
                raise LoadError("is no path, class and attributes")
            path = module_path(record[0], "[0]", root=True)
            expect(record[1], STRING, "[1]")
            for name, text in expect(record[2], OBJECT, "[2]").items():
                expect(text, STRING, f"[2].{shown(name)}")
            if path in seen:
                raise LoadError(f"{shown(path)} is described twice")
            seen.add(path)
    return records


def _read_named(records: list[Any]) -> list[dict[str, Any]]:
    found, seen = [], set[str]()
    for i, record in enumerate(records):
        with inside(f"named_modules[{i}]"):
            found.append(named_modules.check(record))
            for path in (record["path"], *record.get("also", ())):
                if path in seen:
                    raise LoadError(f"{path} is described twice", "path")
                seen.add(path)
    return found


def _read_plans(records: list[Any], devices: Devices, device: torch.device) -> list[SavedPlan]:
    if not 1 <= len(records) <= _MAX_PLANS:
        raise LoadError(f"are {len(records)}, not between 1 and {_MAX_PLANS}", "plans")
    found = []
    for i, record in enumerate(records):
        with inside(f"plans[{i}]"):
            found.append(read_plan(record, devices, device))
    return found
