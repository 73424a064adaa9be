"""Alike blocks: they share plans, told by what they are made of.

layers.0, layers.1, ..., layers.31    one list of plans; self_attn.layer_idx is read as it runs
layers.5 with a sliding window        another
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from liger_fx.engine.site import Site
from liger_fx.model.plan import Plan
from liger_fx.model.refusals import Refusals
from liger_fx.model.tree import copy_tree
from liger_fx.tracing.call import PLAIN, CallSpec
from liger_fx.tracing.tree_state import class_of, hooks_of, is_capturing
from liger_fx.tracing.walk import modules_by_path

_INTERNALS = frozenset(vars(nn.Module()))
# What no graph of a block depends on: a checkpointed layer is called as it is.
_OWN = frozenset(("_block", "_origins", "gradient_checkpointing", "_gradient_checkpointing_func"))


class Alike:
    """The plans of blocks that are made alike, and what was refused.

    attributes: paths of the ints in which they differ, read from each block as its graph runs.
    ints: the others, which they share. asking: calls whose numbers cannot be left open.
    rewritten: sites of plans that were made before the blocks were changed.
    compiled: what torch.compile uses of the plans.
    """

    def __init__(self, key: Hashable, attributes: tuple[str, ...]) -> None:
        self.key, self.attributes = key, attributes
        self.ints: dict[str, int] = {}
        self.plans: list[Plan] = []
        self.refusals = Refusals()
        self.asking: list[CallSpec] = []
        self.rewritten: tuple[Site, ...] = ()
        self.compiled = SimpleNamespace()
        self._members: list[weakref.ref[nn.Module]] = []

    def sites(self) -> tuple[Site, ...]:
        """What was rewritten in these blocks."""
        found = told_once([self.rewritten, *(plan.sites for plan in self.plans)])
        return tuple(site for site in found if site.after)

    def shared(self, ints: dict[str, int]) -> dict[str, int]:
        """Those of a block's ints that all of these blocks share."""
        return {path: value for path, value in ints.items() if path not in self.attributes}

    def is_like(self, key: Hashable, ints: dict[str, int]) -> bool:
        """Whether a block that is described so is one of these."""
        return key == self.key and self.shared(ints) == self.ints

    def add(self, block: nn.Module) -> None:
        """Count a block in."""
        self._members.append(weakref.ref(block))

    def remove(self, block: nn.Module) -> None:
        """The block is not like the others any more."""
        self._members = [ref for ref in self._members if ref() is not block]

    @property
    def members(self) -> list[Any]:
        """The blocks, in the order in which they were found."""
        return [block for ref in self._members if (block := ref()) is not None]

    def __getstate__(self) -> dict[str, Any]:
        names = ("attributes", "ints", "plans", "rewritten")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(None, state["attributes"])  # type: ignore[misc]
        self.__dict__.update(state)


def told_once(groups: Iterable[Iterable[Site]]) -> Iterator[Site]:
    """The sites that several graphs of a block tell of: those of each, but where one before it told
    of that rule at that path."""
    told = set[tuple[str, str]]()
    for group in groups:
        new = [site for site in group if (site.rule, site.path) not in told]
        told.update((site.rule, site.path) for site in new)
        yield from new


def describe(block: nn.Module) -> tuple[Hashable, dict[str, int]]:
    """What a block is made of, but for its ints, and those, by path."""
    parts: list[Hashable] = []
    ints: dict[str, int] = {}
    seen: dict[int, str] = {}
    for path, module in modules_by_path(block).items():
        attributes = vars(module)
        plain: list[Hashable] = []
        for name, value in attributes.items():
            if name in _INTERNALS or name in _OWN:
                continue
            if type(value) is int:
                ints[f"{path}.{name}" if path else name] = value
                plain.append((name, int))
            else:
                plain.append((name, _value(value)))
        tensors = tuple(
            (name, seen.setdefault(id(t), f"{path}.{name}"), _tensor(t))
            for group in (module._parameters, module._buffers)
            for name, t in group.items()
        )
        hooks = [hook for hooks in hooks_of(module) for hook in hooks.values()] if path else []
        is_hooked = not all(map(is_capturing, hooks))
        parts.append((path, class_of(module), tuple(plain), tensors, is_hooked))
    return tuple(parts), ints


def _value(value: Any, inside: bool = False) -> Hashable:
    """inside: whether it is held by a container. A tensor there is a constant of a graph."""
    if isinstance(value, PLAIN):
        return type(value), repr(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_value(item, True) for item in value)
    if isinstance(value, dict):
        return type(value), tuple((repr(key), _value(item, True)) for key, item in value.items())
    if isinstance(value, torch.Tensor) and not inside:
        return _tensor(value)
    if isinstance(value, functools.partial):
        return value.func, _value(value.args, True), _value(value.keywords, True)
    return type(value), id(value)


def _tensor(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    kind = type(tensor)
    return kind, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def differing(ints: list[dict[str, int]]) -> tuple[str, ...]:
    """The paths at which blocks of one make hold different ints."""
    return tuple(path for path in ints[0] if len({own[path] for own in ints}) > 1)


def places(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block by path, as they hang there now."""
    return modules_by_path(block, every_place=True)


class Transplant:
    """Puts the named modules that a rewrite put into one block into blocks like it.

    before: the modules of the rewritten block by path, as they were.
    """

    def __init__(self, block: nn.Module, before: dict[str, nn.Module]) -> None:
        self.before = before
        now = places(block)
        self.new = {path: m for path, m in now.items() if before.get(path) is not m}
        self.new = {p: m for p, m in self.new.items() if p.rpartition(".")[0] not in self.new}

    def undo(self, block: nn.Module) -> None:
        """Put the modules back that stood in the rewritten block."""
        own = places(block)
        for path in self.new:
            owner, _, name = path.rpartition(".")
            if path in self.before:
                own[owner].add_module(name, self.before[path])
            else:
                delattr(own[owner], name)

    def onto(self, block: nn.Module) -> None:
        """Give ``block`` modules like the new ones, around its own parameters and modules."""
        known: dict[int, Any] = {}
        own = places(block)
        for path, module in self.before.items():
            if path not in own:  # a named module in a block inside that was rewritten before
                continue
            known[id(module)] = own[path]
            for theirs, ours in zip(_tensors(module), _tensors(own[path]), strict=True):
                known[id(theirs)] = ours
        for path, module in self.new.items():
            owner, _, name = path.rpartition(".")
            twin = copy_tree(module, instead=known)
            for below, made in modules_by_path(twin).items():
                _take_hooks(made, own.get(f"{path}.{below}".rstrip(".")))
            own[owner].add_module(name, twin)


_HOOKS = tuple(name for name in _INTERNALS if "hooks" in name)


def _take_hooks(made: nn.Module, stood: nn.Module | None) -> None:
    """The hooks of what stood there, in the same dictionaries: who put one there removes it there.
    Not those of the module that it was made like."""
    held = vars(nn.Module() if stood is None else stood)
    vars(made).update({name: held[name] for name in _HOOKS})


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for group in (module._parameters, module._buffers):
        yield from (tensor for tensor in group.values() if tensor is not None)
