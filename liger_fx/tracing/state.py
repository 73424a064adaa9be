"""Modules whose forward writes to the model: a graph would not, so they stay modules that are
called.

    self.step += 1                         self.aux = loss.detach()
    self.ema = self.ema * 0.9 + mean       self.log["seen"].append(n)

Found by comparing a module's attributes before and after its traced forward. What ends as it was
(an equal number, a tensor that went through a ``.to`` without effect, a buffer written in place,
which the graph records) was not changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.fakes import FakeWorld, as_expr, node_of
from liger_fx.tracing.root_state import Snapshot
from liger_fx.tracing.tree_state import CAPTURING
from liger_fx.tracing.walk import module_at

Place = tuple[str, str]  # a module's path and the name of an attribute
_MISSING = object()
_TENSORS = ("_parameters", "_buffers", "_modules")
_HARMLESS = frozenset(nn.Module().__dict__) - {"training"} | {CAPTURING}
_CASTS = ("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "contiguous")


def written(before: Snapshot, modules: Mapping[nn.Module, str], world: FakeWorld) -> list[Place]:
    """The attributes of these modules (by path) that are not what they were; of those, that
    ``before`` has seen."""
    before.compare()
    look = functools.partial(same, before, world)
    found: list[Place] = []
    for module, path in modules.items():
        if before.before(module.__dict__) is None:
            continue
        groups = [module.__dict__, *(module.__dict__[name] for name in _TENSORS)]
        for group in groups:
            then = before.before(group)
            for name in then.keys() | group.keys():
                if group is groups[0] and (name in _HARMLESS or _is_cached(module, name)):
                    continue
                if not look(then.get(name, _MISSING), group.get(name, _MISSING)):
                    found.append((path, name))
    return sorted(found)


def same(before: Snapshot, world: FakeWorld, then: Any, now: Any) -> bool:
    """Whether a value that was, of which ``before`` knows what it held, is as good as this one."""
    if isinstance(then, torch.Tensor):
        return then is now or _is_that(world, then, now)
    if then is now:
        return not before.changed or _holds_the_same(before, world, now)
    if isinstance(now, torch.SymInt):
        now = as_expr(now)  # a size that the code fixed is a number
    if type(then) is not type(now):
        return False
    if isinstance(now, (dict, list, deque, tuple)):
        old = before.before(then)
        old = then if old is None else old
        if len(old) != len(now) or isinstance(now, dict) and old.keys() != now.keys():
            return False
        pairs = [(old[k], now[k]) for k in (now if isinstance(now, dict) else range(len(now)))]
        return all(same(before, world, a, b) for a, b in pairs)
    if isinstance(now, set):
        old = before.before(then)
        return bool((then if old is None else old) == now)
    if isinstance(now, (*PLAIN, complex, bytes)):
        return bool(now == then) or (now != now and then != then)
    # A bound method is made anew at each look at it.
    return hasattr(now, "__self__") and now == then


def _holds_the_same(before: Snapshot, world: FakeWorld, value: Any) -> bool:
    """Whether a container, or an object with attributes, holds what it held, and these do."""
    if id(value) in before.looked_at:  # it holds itself, by way of others
        return True
    before.looked_at.add(id(value))
    try:
        return all(_equal(before, world, then, now) for then, now in before.changes_below(value))
    finally:
        before.looked_at.discard(id(value))


def _equal(before: Snapshot, world: FakeWorld, then: Any, now: Any) -> bool:
    """Whether what a container holds now is as good as what it held."""
    if len(then) != len(now) or isinstance(then, (np.ndarray, bytes)):
        return False
    if isinstance(then, set):
        return bool(then == now)
    if isinstance(then, dict):
        return then.keys() == now.keys() and all(
            same(before, world, then[key], now[key]) for key in now
        )
    return all(same(before, world, *pair) for pair in zip(then, now, strict=True))


def _is_that(world: FakeWorld, real: torch.Tensor, now: Any) -> bool:
    """Whether ``now`` is the fake of ``real``, or that after casts without effect."""
    if not isinstance(now, torch.Tensor):
        return False
    fake = world.of_real(real)
    if now is fake:
        return True
    node, origin = node_of(now), node_of(fake)
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _CASTS:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.meta.get("spec") != node.meta.get("spec"):
            return False
        if source is origin:
            return True
        node = source
    return False


def _is_cached(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(type(module), name, None), functools.cached_property)


class HiddenState:
    """Attributes that a called module writes, kept from the eyes of the code around it.

    A graph that had read one while it was made would hold its value of that day. So such a read
    stops the trace.
    """

    def __init__(self, before: Snapshot, modules: Mapping[str, nn.Module], places: Iterable[Place]):
        self.before = before
        self.places = {(modules[path], name): path for path, name in places}
        self.hide()

    def add(self, root: nn.Module, places: Iterable[Place]) -> None:
        """Hide more."""
        for path, name in places:
            module = module_at(root, path)
            if self.before.before(module.__dict__) is not None:
                self.places.setdefault((module, name), path)
        self.hide()

    def hide(self) -> None:
        """Take the attributes out of their modules; ``before`` puts them back in the end."""
        for module, name in self.places:
            for group in _groups(module):
                group.pop(name, None)

    @contextlib.contextmanager
    def shown(self, root: nn.Module) -> Iterator[None]:
        """``root`` as it is in truth, while its own code runs."""
        self.show(root)
        try:
            yield
        finally:
            self.hide()

    def show(self, root: nn.Module) -> None:
        """Put them back into ``root`` and what is below it."""
        below = set(root.modules()) if self.places else set()
        for module, name in self.places:
            if module in below:
                for group in _groups(module):
                    then = self.before.before(group)
                    if name in then:
                        group[name] = then[name]


def _groups(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield module.__dict__
    for name in _TENSORS:
        yield module.__dict__[name]
