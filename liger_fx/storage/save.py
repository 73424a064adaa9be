"""liger_fx.save: an optimised model as a directory that ``load`` and transformers can read.

    opt   ->   graph.json  config.json  model.safetensors  buffers.safetensors  report.json
               checksums.json

config.json and model.safetensors are those of any transformers checkpoint. Nothing is written
unless ``load`` would take it, and nothing is replaced before all of it is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from liger_fx.codec import encode
from liger_fx.errors import LoadError, SaveError, UsageError
from liger_fx.model.account import blocks_of, report_of
from liger_fx.model.alike import Alike
from liger_fx.model.block import Block
from liger_fx.model.plan import Plan
from liger_fx.report import GraphDiff
from liger_fx.storage import config, fingerprint, named_modules, skeleton
from liger_fx.storage.checksums import write_checksums
from liger_fx.storage.directory import replacing, write_file
from liger_fx.storage.files import (
    BUFFERS,
    CONFIG,
    FORMAT,
    GENERATION_CONFIG,
    GRAPH,
    INDEX,
    REPORT,
    SAVED_GRAPH,
)
from liger_fx.storage.json_file import dump
from liger_fx.storage.model_class import is_known
from liger_fx.storage.original import Original
from liger_fx.storage.plans import plan_record
from liger_fx.storage.records import SCHEMA, BlockRecord, Document, ModelRecord
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
    if not isinstance(opt, Block):
        raise UsageError(f"Expected what optimize() returned, got a {type(opt).__name__}.")
    groups = usable_groups(opt)
    if not any(group.plans for group in groups):
        raise SaveError(
            f"The dtype, device or config of this {type(opt).__name__}, or an attribute that its "
            "code reads, is not what its graph was traced for: call it once, so that it is traced "
            "anew."
        )
    tensors = describe(opt, wanted_tensors(groups))
    document = _document(opt, groups, tensors, weights)
    if document.device.type == "meta" and weights:
        raise SaveError(
            f"This {type(opt).__name__} has no weights, it is on the meta device: save it with "
            "weights=False."
        )
    if not isinstance(path, (str, PathLike)):
        raise UsageError(f"Expected the path of a directory, got a {type(path).__name__}.")
    with replacing(Path(path), SAVED_GRAPH) as folder:
        _write_document(folder, document)
        if document.model.model_type is not None:
            write_configs(opt, folder)
        if document.selection is not None:
            write_file(folder / REPORT, _portable(report_of(opt)).json().encode())
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
        write_checksums(folder)


def _problem(opt: Block, folder: Path) -> str | None:
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
    write_file(folder / CONFIG, config.config_text(opt.config, opt.block_class.__name__))
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


@dataclass(frozen=True)
class Group:
    """Alike blocks at ``paths``, and those of their plans that can still be used, by the numbers
    that they have."""

    paths: list[str]
    attributes: tuple[str, ...]
    plans: dict[int, Plan]

    @property
    def numbers(self) -> dict[int, int]:
        """The number that each plan gets in the file."""
        return {number: i for i, number in enumerate(self.plans)}


def usable_groups(opt: Block) -> list[Group]:
    """The blocks of ``opt``, alike ones together, with the plans that fit the model as it is and
    call nothing but such plans."""
    paths: dict[Alike, list[str]] = {}
    for path, block in blocks_of(opt).items():
        paths.setdefault(block._block.alike, []).append(path)
    groups: dict[str, Group] = {}
    for alike, where in reversed(paths.items()):  # what is inside comes later
        first = opt.get_submodule(where[0])
        plans = {
            number: plan
            for number, plan in enumerate(alike.plans)
            if plan.fits(first)
            and plan.stands(first)
            and all(n in groups[f"{where[0]}.{p}".lstrip(".")].plans for p, n in plan.inner)
        }
        group = Group(where, alike.attributes, plans)
        groups |= dict.fromkeys(where, group)
    return [groups[where[0]] for where in paths.values()]


def wanted_tensors(groups: Iterable[Group]) -> Callable[[Slot], bool]:
    """Parameters and buffers, and of the tensors that are attributes those that a graph reads."""
    read = {
        f"{path}.{node.target}".lstrip(".")
        for group in groups
        for plan in group.plans.values()
        for node in plan.graph.find_nodes(op="get_attr")
        for path in group.paths
    }

    def wanted(slot: Slot) -> bool:
        return slot.kind != ATTRIBUTE or slot.path in read

    return wanted


def _document(
    opt: Block, groups: list[Group], tensors: list[Tensor], with_weights: bool
) -> Document:
    device = _device_of(opt)
    settings: Any = getattr(opt, "config", None)
    known = is_known(opt.block_class, settings)
    has_config = isinstance(settings, PreTrainedConfig)
    original = Original(opt)
    graphs = [plan.graph for group in groups for plan in group.plans.values()]
    traced_from = fingerprint.fingerprint(original.code, graphs)
    followed = {
        f"{path}.{inner}".strip(".")
        for group in groups
        for plan in group.plans.values()
        for inner in plan.paths
        for path in group.paths
    }
    return Document(
        format=FORMAT,
        schema=SCHEMA,
        model=ModelRecord(opt.block_class.__name__, settings.model_type if known else None),
        fingerprint=fingerprint.require(traced_from),
        device=device,
        training=opt.training,
        other_modes=[p for p, m in opt.named_modules() if m.training != opt.training],
        weights=with_weights,
        selection=opt._block.planner.selection,
        implementations=config.implementations(settings) if has_config else {},
        modules=original.describe(followed),
        named_modules=named_modules.describe(opt),
        tensors=list(records(tensors)),
        blocks=list(_block_records(groups, device)),
    )


def _block_records(groups: list[Group], device: torch.device) -> Iterator[BlockRecord]:
    numbers = {path: group.numbers for group in groups for path in group.paths}
    for group in groups:
        prefix = f"{group.paths[0]}." if group.paths[0] else ""
        inside = {p.removeprefix(prefix): n for p, n in numbers.items() if p.startswith(prefix)}
        plans = [plan_record(plan, device, inside) for plan in group.plans.values()]
        yield BlockRecord(group.paths, plans, list(group.attributes))


def _portable(report: GraphDiff) -> GraphDiff:
    return replace(report, sites=tuple(map(portable, report.sites)))


def _device_of(opt: Block) -> torch.device:
    """The one device of all parameters and buffers."""
    devices = {tensor.device for tensor in (*opt.parameters(), *opt.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise SaveError(f"The model is on several devices ({names}): move it to one first.")
    return devices.pop() if devices else torch.device("cpu")
