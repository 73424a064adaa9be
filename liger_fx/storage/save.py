"""liger_fx.save: an optimised model as a directory that ``load`` and transformers can read.

    opt   ->   graph.json  config.json  model.safetensors  buffers.safetensors  report.json

config.json and model.safetensors are those of any transformers checkpoint. Nothing is written
unless ``load`` would take it, and nothing is replaced before all of it is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from liger_fx.codec import encode
from liger_fx.engine.rule import Selection
from liger_fx.errors import LoadError, SaveError, UsageError
from liger_fx.graph_model import GraphModel
from liger_fx.plan import Plan
from liger_fx.planning import Planner
from liger_fx.storage import config, fingerprint, named_modules, skeleton
from liger_fx.storage.directory import replacing, write_file
from liger_fx.storage.files import (
    BUFFERS,
    CONFIG,
    FORMAT,
    GENERATION_CONFIG,
    GRAPH,
    INDEX,
    SAVED_GRAPH,
    report_name,
)
from liger_fx.storage.json_file import dump
from liger_fx.storage.model_class import is_known
from liger_fx.storage.original import Original
from liger_fx.storage.plans import plan_record
from liger_fx.storage.records import SCHEMA, Document, ModelRecord
from liger_fx.storage.saved import read_saved
from liger_fx.storage.sources import portable
from liger_fx.storage.tensors import write_safetensors
from liger_fx.storage.values import FORMS
from liger_fx.storage.weights import (
    ATTRIBUTE,
    Slot,
    Tensor,
    describe,
    records,
    shards,
    slots,
)


def save(opt: nn.Module, path: str | PathLike[str], *, weights: bool = True) -> None:
    """Write what ``liger_fx.optimize`` or ``trace`` returned to the directory ``path``.

    The directory may be new, empty, or hold an earlier save, which is replaced when all is written.
    Graphs that the model could not use any more (its dtype, device or config was changed since)
    are left out.

    weights: False leaves the weights out; ``load`` then needs a model or a checkpoint. A model that
        cannot be made again from its config (one with adapters, one that is not transformers' own)
        can be saved in this way only.

    Raises SaveError, saying what stands in the way: nothing was written then, and what was there is
    whole. UsageError for what is no optimised or traced model.
    """
    if not isinstance(opt, GraphModel):
        raise UsageError(f"Expected what optimize() returned, got a {type(opt).__name__}.")
    plans = [plan for plan in opt.plans if plan.fits(opt)]
    if not plans:
        raise SaveError(
            f"The dtype, device or config of this {type(opt).__name__} is not what its graph was "
            "traced for: call it once, so that it is traced anew."
        )
    tensors = describe(opt, wanted_tensors(plans))
    document = _document(opt, plans, tensors, weights)
    if document.device.type == "meta" and weights:
        raise SaveError(
            f"This {type(opt).__name__} has no weights, it is on the meta device: save it with "
            "weights=False."
        )
    with replacing(Path(path), SAVED_GRAPH) as folder:
        _write_document(folder, document)
        if document.model.model_type is not None:
            write_configs(opt, folder)
        for i, plan in enumerate(plans):
            if plan.report is not None:
                write_file(folder / report_name(i), portable(plan.report).json().encode())
        write_tensors(opt, folder, [t for t in tensors if not t.in_checkpoint])
        problem = _problem(opt, folder)
        if problem is not None and weights:
            raise SaveError(
                f"This {type(opt).__name__} could not be loaded again ({problem}). Saved with "
                "weights=False, it can be bound to such a model: load(path, model=...)."
            )
        if problem is not None:
            _make_bindable_only(folder, document)
        if weights:
            write_tensors(opt, folder, [t for t in tensors if t.in_checkpoint])


def _problem(opt: GraphModel, folder: Path) -> str | None:
    """Why the model cannot be made again from what was written; None if it can."""
    try:
        saved = read_saved(folder, checkpoint=False)
    except LoadError as error:
        raise SaveError(f"This {type(opt).__name__} has no form in a file: {error}") from error
    try:
        skeleton.check(skeleton.from_config(saved), saved)
    except LoadError as error:
        return str(error)
    return None


def _write_document(folder: Path, document: Document) -> None:
    write_file(folder / GRAPH, dump(encode(document, FORMS)))


def _make_bindable_only(folder: Path, document: Document) -> None:
    for name in (GRAPH, CONFIG, GENERATION_CONFIG):
        (folder / name).unlink(missing_ok=True)
    _write_document(folder, replace(document, model=replace(document.model, model_type=None)))


def write_configs(opt: Any, folder: Path) -> None:
    """config.json and generation_config.json, as any transformers checkpoint has them."""
    write_file(folder / CONFIG, config.config_text(opt.config, opt.model_class.__name__))
    if getattr(opt, "generation_config", None) is not None:
        write_file(folder / GENERATION_CONFIG, config.generation_text(opt.generation_config))


def write_tensors(opt: nn.Module, folder: Path, tensors: list[Tensor]) -> None:
    """The safetensors files of these tensors of ``opt``."""
    places = {slot.path: slot.tensor for slot in slots(opt)}
    made = {t.path: places[t.path] for t in tensors if not t.in_checkpoint}
    if made and not any(tensor.is_meta for tensor in made.values()):
        write_safetensors(folder / BUFFERS, made)
    split = shards({t.path: places[t.path] for t in tensors if t.in_checkpoint})
    for name, paths in split.filename_to_tensors.items():
        write_safetensors(folder / name, {path: places[path] for path in paths})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_file(folder / INDEX, dump(index))


def wanted_tensors(plans: list[Plan]) -> Callable[[Slot], bool]:
    """Parameters and buffers, and of the tensors that are attributes those that a graph reads."""
    read = {str(n.target) for plan in plans for n in plan.graph.find_nodes(op="get_attr")}

    def wanted(slot: Slot) -> bool:
        return slot.kind != ATTRIBUTE or slot.path in read

    return wanted


def _document(
    opt: GraphModel, plans: list[Plan], tensors: list[Tensor], with_weights: bool
) -> Document:
    device = _device_of(opt)
    settings: Any = getattr(opt, "config", None)
    known = is_known(opt.model_class, settings)
    has_config = isinstance(settings, PreTrainedConfig)
    original = Original(opt)
    traced_from = fingerprint.fingerprint(original.code, [plan.graph for plan in plans])
    return Document(
        format=FORMAT,
        schema=SCHEMA,
        model=ModelRecord(opt.model_class.__name__, settings.model_type if known else None),
        fingerprint=fingerprint.require(traced_from),
        device=device,
        training=opt.training,
        other_modes=[p for p, m in opt.named_modules() if m.training != opt.training],
        weights=with_weights,
        selection=_selection(opt._make_plan),
        implementations=config.implementations(settings) if has_config else {},
        modules=original.describe({path for plan in plans for path in plan.paths}),
        named_modules=named_modules.describe(opt),
        tensors=list(records(tensors)),
        plans=[plan_record(plan, device) for plan in plans],
    )


def _selection(make_plan: Any) -> Selection | None:
    if not isinstance(make_plan, Planner):
        raise SaveError("The model makes its graphs in a way that no file can say.")
    return make_plan.selection


def _device_of(opt: GraphModel) -> torch.device:
    """The one device of all parameters and buffers."""
    devices = {tensor.device for tensor in (*opt.parameters(), *opt.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise SaveError(f"The model is on several devices ({names}): move it to one first.")
    return devices.pop() if devices else torch.device("cpu")
