"""liger_fx.load: a saved graph and its model, without a trace and without a search.

    llama-graph/   ->   the model on the meta device  ->  named modules  ->  weights, one by one

No code comes with the directory. What its files name is looked up in tables of this package and of
transformers; what is not there, or does not fit, is one LoadError, and nothing was built then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from liger_fx.codec import inside
from liger_fx.errors import LoadError, RetraceWarning
from liger_fx.model.account import blocks_of, tree_rows
from liger_fx.model.alike import Alike
from liger_fx.model.block import Block
from liger_fx.model.build import turn_into_blocks
from liger_fx.model.planner import Planner
from liger_fx.storage import arguments, skeleton
from liger_fx.storage.checksums import LOAD_ANYWAY, check_checksums
from liger_fx.storage.files import CHECKSUMS, unreplaced
from liger_fx.storage.records import Document
from liger_fx.storage.saved import Saved, read_saved
from liger_fx.storage.sources import locate
from liger_fx.storage.stored import Stored
from liger_fx.storage.weights import PARAMETER, Slot, Tensor, total_bytes
from liger_fx.tracing.garbage import garbage_kept
from liger_fx.tracing.tree_state import Kind

StrPath = str | PathLike[str]


def load(
    path: StrPath,
    *,
    model: nn.Module | None = None,
    checkpoint: StrPath | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify_checksums: bool = True,
) -> Block:
    """The optimised model that ``liger_fx.save`` wrote to the directory ``path``.

    It is in the mode (train or eval) in which it was saved, and meets kinds of call that it has no
    graph for as the result of ``liger_fx.optimize`` does.

    model: take the weights of this model, and share them, as ``optimize`` does. It must be of the
        class, config and shapes that were saved.
    checkpoint: take the weights from this directory: model.safetensors, or its shards and index,
        under the names that the model has. (Checkpoints of mixtures of experts have others, which
        transformers converts: read the model with ``from_pretrained`` and give ``model=``.)
    device: where the weights and the graph go; by default where they were saved.
    dtype: of the weights, float32, bfloat16, float16 or float64; those of the dtype that most have
        are converted. Graphs hold for the dtypes they were traced with: for others, each kind of
        call is traced anew, after a RetraceWarning.
    verify_checksums: whether files that are not as they were written are refused. All that is read
        is read once more for that: about a second for 1.5 GB.

    Raises LoadError, naming the file and the node or field, for files that are damaged, of a later
    version or not to be trusted, for model code that has changed since, and for what does not fit;
    UsageError for arguments that exclude each other or are of another kind.
    """
    arguments.check(path, model, checkpoint, device, dtype)
    target = arguments.device_of(model) if model is not None else arguments.usable(device)
    with unreplaced(Path(path)):
        own_weights = model is None and checkpoint is None
        verified = not verify_checksums or check_checksums(Path(path), own_weights)
        with garbage_kept():
            saved = read_saved(Path(path), target)
            if not verified:
                raise LoadError(f"is missing; {LOAD_ANYWAY}", CHECKSUMS)
            if model is not None:
                tree = skeleton.from_model(saved, model)
            else:
                _check_loadable(saved)
                tree = skeleton.from_config(saved)
            places = skeleton.check(tree, saved)
        _fill(saved, places, _weights(saved, checkpoint, model), dtype)
        return _finished(saved, tree)


def _check_loadable(saved: Saved) -> None:
    arguments.usable(saved.device)
    if saved.document.device.type == "meta":
        raise LoadError(
            "was made of a model without weights, so it lacks the tensors that the model's "
            "code makes: give the model itself, load(path, model=...)",
            "graph.json",
        )


def _weights(saved: Saved, checkpoint: StrPath | None, model: nn.Module | None) -> Stored | None:
    """Where the checkpoint's tensors are to be read; None where a model has them."""
    if model is not None:
        return None
    if checkpoint is not None:
        with inside(str(checkpoint)):
            stored = Stored.in_checkpoint(Path(checkpoint))
            wanted = [t for t in saved.tensors if t.in_checkpoint]
            stored.check(wanted, exact=False)
            return stored
    if saved.checkpoint is None:
        raise LoadError(
            "was saved without weights: give load(path, model=...) or load(path, checkpoint=...)",
            "graph.json",
        )
    return saved.checkpoint


def _fill(
    saved: Saved, places: Mapping[str, Slot], weights: Stored | None, dtype: torch.dtype | None
) -> None:
    """Put every tensor in its places; those of a given model are there already."""
    dtypes = _dtypes(saved.tensors, dtype)
    made = [t for t in saved.tensors if places[t.path].tensor.is_meta or weights is not None]
    for stored, of_checkpoint in ((weights, True), (saved.constants, False)):
        wanted = [t for t in made if t.in_checkpoint is of_checkpoint]
        for tensor, value in _read(stored, wanted) if stored is not None else ():
            value = value.to(saved.device, dtypes.get(tensor.path, tensor.dtype))
            _place(tensor, value, places)


def _read(stored: Stored, wanted: list[Tensor]) -> Iterator[tuple[Tensor, torch.Tensor]]:
    by_name = {name: t for t in wanted for name in t.places if name in stored.entries}
    there = set(map(id, by_name.values()))
    lacking = [t.path for t in wanted if id(t) not in there]
    if lacking:
        raise LoadError("was saved without values", lacking[0])
    # tied tensors may be in a checkpoint more than once
    first = {id(t): name for name, t in reversed(by_name.items())}
    for name, value in stored.read(first.values()):
        yield by_name[name], value


def _place(tensor: Tensor, value: torch.Tensor, places: Mapping[str, Slot]) -> None:
    if PARAMETER in tensor.places.values():
        value = nn.Parameter(value, requires_grad=not tensor.frozen and _has_gradient(value))
    for path in tensor.places:
        places[path].group[places[path].name] = value


def _has_gradient(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _dtypes(tensors: list[Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The tensors of a checkpoint that are to have another dtype: those of the most usual one."""
    floating = [t for t in tensors if t.in_checkpoint and t.dtype.is_floating_point]
    if dtype is None or not floating:
        return {}
    kinds = {t.dtype for t in floating}
    usual = max(kinds, key=lambda kind: total_bytes(t for t in floating if t.dtype == kind))
    return {t.path: dtype for t in floating if t.dtype == usual}


def _finished(saved: Saved, tree: nn.Module) -> Block:
    found = saved.document
    _set_modes(tree, found)
    planner = Planner(found.selection)
    report = saved.report
    planner.original = report.before.tree if report else tree_rows(tree)
    planner.verified = report.verified if report else None
    planner.fallbacks = list(report.fallbacks if report else ())
    kinds = _kinds(saved, tree)
    groups = []
    for block in saved.blocks:
        alike = Alike(None, tuple(block.attributes))
        for part in block.plans:
            for node in part.graph.nodes:
                if node.meta["source"] is not None:
                    node.meta["source"] = locate(node.meta["source"])
            plan = part.plan()
            plan.assume(tree.get_submodule(block.paths[0]), _below(kinds, block.paths[0]))
            alike.plans.append(plan)
        groups.append((block.paths, alike))
    root = turn_into_blocks(tree, groups, planner)
    for block in blocks_of(root).values():
        for plan in block._block.alike.plans:
            plan.settle(block)
    if not any(plan.fits(b) for b in blocks_of(root).values() for plan in b.plans):
        warnings.warn(
            f"{found.model.class_}: the saved graphs are for other dtypes or devices than the "
            "weights have now; each kind of call is traced anew when it is first made.",
            RetraceWarning,
            stacklevel=3,
        )
    return root


def _below(kinds: dict[str, Kind], path: str) -> dict[str, Kind]:
    prefix = f"{path}." if path else ""
    return {p.removeprefix(prefix): kind for p, kind in kinds.items() if p.startswith(prefix)}


def _set_modes(tree: nn.Module, found: Document) -> None:
    tree.train(found.training)
    for path, module in tree.named_modules():
        if path in found.other_modes:
            module.training = not found.training


def _kinds(saved: Saved, tree: nn.Module) -> dict[str, Kind]:
    """The dtypes and devices that the graphs take for granted."""
    dtypes = {path: tensor.dtype for tensor in saved.tensors for path in tensor.places}
    return {
        path: (dtypes[path], saved.device)
        for path, _ in tree.named_parameters(remove_duplicate=False)
    }
