"""The tree of a saved graph before its weights come in, and the proof that it is the right one.

    config.json      ->  LlamaForCausalLM on the meta device  ->  LigerRMSNorm, ... in their places
    a given model    ->  a tree that shares its weights       ->  the same

Every module, tensor and name that the graph relies on is held against what was saved.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn

from liger_fx.codec import encode, inside, shown
from liger_fx.engine.rule import Selection
from liger_fx.errors import LoadError
from liger_fx.model.tree import copy_tree
from liger_fx.storage import config, fingerprint, leaf_calls, model_class, named_modules
from liger_fx.storage.calls import check_arguments, own_numbers
from liger_fx.storage.files import CONFIG, GENERATION_CONFIG, GRAPH
from liger_fx.storage.original import Original, compare_modules
from liger_fx.storage.plans import SavedBlock
from liger_fx.storage.records import TensorKind
from liger_fx.storage.saved import Saved
from liger_fx.storage.weights import CONSTANT, IN_CHECKPOINT, Slot, Tensor, slots
from liger_fx.storage.writes import check_writes
from liger_fx.tracing.tree_state import class_of

T = TypeVar("T")


def from_config(saved: Saved) -> nn.Module:
    """The tree on the meta device, named modules in place; LoadError where it cannot be made."""
    found = saved.document
    kind, name = found.model.model_type, found.model.class_
    if saved.config is None or kind is None:
        raise LoadError(
            f"{name} cannot be made from a config: give the model itself, load(path, model=...)",
            "model",
        )
    with inside(f"{GRAPH}.model"):
        cls = model_class.find_class(kind, name)
    largest = max((math.prod(t.shape) for t in saved.tensors), default=0)
    with inside(CONFIG):
        made = config.read_config(saved.config, found.implementations)
        model = model_class.build(cls, made, 4 * len(found.modules) + 1000, largest)
        config.choose(made, found.implementations)  # the model's class may have chosen others
    if saved.generation is not None:
        with inside(GENERATION_CONFIG):
            model.generation_config = config.read_generation(saved.generation)
    _install(model, saved)
    return model


def from_model(saved: Saved, model: nn.Module) -> nn.Module:
    """A tree around the weights of ``model``, which stays as it is, with named modules in place."""
    found = saved.document
    name = type(model).__name__
    if name != found.model.class_:
        raise LoadError(f"the graph is one of a {found.model.class_}, not of a {name}", "model")
    settings: Any = getattr(model, "config", None)
    if saved.config is not None:
        with inside(CONFIG):
            config.compare(config.read_config(saved.config, found.implementations), settings)
    if found.implementations and any(plan.guards.attention_fixed for plan in saved.plans):
        now = config.implementations(settings)
        if now != found.implementations:
            raise LoadError(f"are {encode(now)} in the model", f"{GRAPH}.implementations")
    bound = copy_tree(model)
    _install(bound, saved)
    return bound


def _install(root: nn.Module, saved: Saved) -> None:
    found = saved.document
    with inside(GRAPH):
        original = Original(root)
        compare_modules(found.modules, original)
        now = fingerprint.fingerprint(original.code, [plan.graph for plan in saved.plans])
        fingerprint.compare(found.fingerprint, now)
        if found.selection is not None:
            _check_selection(found.selection, saved, root)
        for i, record in enumerate(found.named_modules):
            with inside(f"named_modules[{i}]"):
                named_modules.install(root, record)


def check(root: nn.Module, saved: Saved) -> dict[str, Slot]:
    """The tree's places of tensors by path; LoadError unless it is the tree that was saved."""
    with inside(GRAPH):
        places = _compare_tensors(root, saved.tensors)
        modules = dict(root.named_modules(remove_duplicate=False))
        homes = {class_of(module).__module__ for module in modules.values()}
        for i, block in enumerate(saved.blocks):
            with inside(f"blocks[{i}]"):
                _check_block(block, modules, places, homes)
    return places


def _check_block(
    block: SavedBlock, modules: dict[str, nn.Module], places: dict[str, Slot], homes: set[str]
) -> None:
    """Every path of the graphs leads to something in each of the alike blocks."""
    made: list[Any] = []
    for path in block.paths:
        _check_can_be_block(path, modules)
        inner, tensors = _below(modules, path), _below(places, path)
        made.append(_make_of(inner, tensors))
        if made[-1] != made[0]:
            raise LoadError(f"{shown(path)} is not like {shown(block.paths[0])}", "paths")
        ints = set(_ints(inner))
        unknown = sorted({*block.attributes} - ints)
        if unknown:
            raise LoadError(f"{path or 'the model'} has no number {unknown[0]}", "attributes")
        for j, plan in enumerate(block.plans):
            with inside(f"plans[{j}]"):
                check_arguments(plan.guards, class_of(modules[path]).forward)
                unknown = sorted(own_numbers(plan.guards) - ints)
                if unknown:
                    raise LoadError(f"{path or 'the model'} has no number {unknown[0]}", "guards")
            with inside(f"plans[{j}].nodes"):
                config = ["config"] if hasattr(modules[path], "config") else []
                _check_targets(plan.graph, {*inner, *tensors, *ints, *config}, inner.keys())
                if path == block.paths[0]:
                    named_modules.check_calls(plan.graph, inner)
                    leaf_calls.resolve(plan.references, homes)
                    check_writes(plan.graph, tensors.keys(), inner)


def _check_can_be_block(path: str, modules: dict[str, nn.Module]) -> None:
    module = modules.get(path)
    if module is None or named_modules.is_named(module):
        raise LoadError(f"the model has no module {shown(path)} of its own", "paths")
    first = next(p for p, other in modules.items() if other is module)
    if first != path:
        raise LoadError(f"{shown(path)} is the same module as {shown(first)}", "paths")


def _make_of(modules: Mapping[str, nn.Module], tensors: Mapping[str, Slot]) -> Any:
    """What alike blocks share: modules by class, tensors by kind, shape and dtype."""
    kinds = {path: class_of(module) for path, module in modules.items()}
    return kinds, {p: (s.kind, s.tensor.shape, s.tensor.dtype) for p, s in tensors.items()}


def _ints(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The paths of the ints that modules hold, those that can be read by attribute."""
    for path, module in modules.items():
        for name, value in vars(module).items():
            if type(value) is int and name.isidentifier():
                yield f"{path}.{name}".lstrip(".")


def _below(items: Mapping[str, T], path: str) -> dict[str, T]:
    """Those at and below a path, by the paths from there."""
    if not path:
        return dict(items)
    found = {
        p.removeprefix(f"{path}."): item for p, item in items.items() if p.startswith(f"{path}.")
    }
    if path in items:
        found[""] = items[path]
    return found


@dataclass(frozen=True)
class _Named:
    name: str


def _check_selection(selection: Selection, saved: Saved, root: nn.Module) -> None:
    # the rules that the report names: to import our own would take longer than to load
    names = saved.report.rules if saved.report else ()
    rules: Any = [_Named(name) for name in sorted(names)]
    for entry in (*(selection.chosen or ()), *selection.excluded):
        if Selection(None, (entry,)).unknown(rules, root):
            raise LoadError(f"{shown(entry)} is no rule and no module", "selection")


def _compare_tensors(root: nn.Module, tensors: Iterable[Tensor]) -> dict[str, Slot]:
    places = {slot.path: slot for slot in slots(root)}
    known: set[str] = set()
    for tensor in tensors:
        for path, kind in tensor.places.items():
            known.add(path)
            if path not in places:
                places[path] = _add_place(root, path, kind, tensor)
            slot = places[path]
            if slot.kind != kind or slot.tensor.shape != tensor.shape:
                raise LoadError(
                    f"{path} is a {kind} {list(tensor.shape)} in the graph and a {slot.kind} "
                    f"{list(slot.tensor.shape)} in the model",
                    "tensors",
                )
    unknown = [p for p, slot in places.items() if p not in known and slot.tensor.is_meta]
    unknown += [p for p, slot in places.items() if p not in known and slot.kind in IN_CHECKPOINT]
    if unknown:
        raise LoadError(f"the graph knows no tensor {unknown[0]}, which the model has", "tensors")
    return places


def _add_place(root: nn.Module, path: str, kind: TensorKind, tensor: Tensor) -> Slot:
    """A place that the trace made (a constant), or that the model's code makes when it runs."""
    owner_path, _, name = path.rpartition(".")
    owner = dict(root.named_modules()).get(owner_path)
    if owner is None or kind in IN_CHECKPOINT or hasattr(owner, name):
        raise LoadError(f"the model has no {kind} {path}", "tensors")
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if kind == CONSTANT:
        owner.register_buffer(name, empty, persistent=False)
        return Slot(path, kind, owner._buffers, name)
    setattr(owner, name, empty)
    return Slot(path, kind, owner.__dict__, name)


def _check_targets(graph: fx.Graph, known: Collection[str], modules: Collection[str]) -> None:
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in modules:
            raise LoadError(f"the model has no module {node.target}", node.name)
        if node.op == "get_attr" and node.target not in known:
            raise LoadError(f"the model has no module or tensor {node.target}", node.name)
