"""What a trace must find on the model, and must leave as it found it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.contents import MAPPING, Kind, is_same, look_at
from liger_fx.tracing.tree_state import CAPTURING, is_capturing, is_named
from liger_fx.tracing.walk import modules_by_path

_alone = threading.RLock()
_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, set, deque))
_PLAIN = frozenset(PLAIN)
_OF_MODULES = frozenset(("_modules", "_parameters", "_buffers"))


@contextlib.contextmanager
def autocast_cache_off() -> Iterator[None]:
    """Autocast keeps the casts of weights for later calls: a fake one must not get among them."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


@contextlib.contextmanager
def attributes_kept(
    root: nn.Module, modules: Iterable[nn.Module] | None = None
) -> Iterator[Snapshot]:
    """Models store things on themselves during forward; none of it stays after the block.
    ``modules`` are those whose attributes are looked at, all of ``root`` by default; the others
    lose the hooks that transformers puts on them when outputs are collected.

    A second thread that wants to trace waits: it must not take the first one's fakes for its own.
    """
    with _alone:
        before = Snapshot(modules_by_path(root).values() if modules is None else modules)
        first = RemovableHandle.next_id
        capturing = set() if modules is None else _capturing(root)
        try:
            yield before
        finally:
            if modules is not None and RemovableHandle.next_id != first:
                _remove_collecting_hooks(root, first, capturing)
            before.restore()


def _capturing(root: nn.Module) -> set[nn.Module]:
    """The modules that have transformers' hooks, on themselves and inside them."""
    return {module for module in modules_by_path(root).values() if CAPTURING in vars(module)}


def _remove_collecting_hooks(root: nn.Module, first: int, before: set[nn.Module]) -> None:
    """Those of transformers, from that number on, and what it notes on modules that had none."""
    for module in modules_by_path(root).values():
        hooks = module._forward_hooks
        for number in [n for n, hook in hooks.items() if n >= first and is_capturing(hook)]:
            del hooks[number]
    for module in _capturing(root) - before:
        delattr(module, CAPTURING)


class Snapshot:
    """All attributes of some modules: parameters, buffers, children, plain values, and what is in
    the containers and objects among them. No tensor's data is copied."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._seen: dict[int, tuple[Any, Kind, Any]] = {}
        self._empty: list[Any] = []
        modules = list(modules)
        self._modules = {id(child) for module in modules for child in module._modules.values()}
        self._modules.update(map(id, modules))
        self._named = [(m, type(m)) for m in modules if is_named(m)]
        for module in modules:
            attributes = module.__dict__
            self._seen[id(attributes)] = (attributes, MAPPING, dict(attributes))
            for name, value in attributes.items():
                kind = type(value)
                if kind in _PLAIN:
                    continue
                if kind in _CONTAINERS and not value:  # most are: the hooks
                    self._empty.append(value)
                elif name in _OF_MODULES and kind is dict:  # what is in these has its own place
                    self._seen[id(value)] = (value, MAPPING, value.copy())
                else:
                    self.take(value)
        self._were_empty = set(map(id, self._empty))
        self.changed: set[int] = set()
        self.looked_at: set[int] = set()  # what is being compared at the moment

    def take(self, value: Any) -> None:
        """Note what the value holds, and what that holds."""
        for container, kind in self._containers(value, self._seen):
            # The container is kept as well: its id must not be reused.
            self._seen[id(container)] = (container, kind, kind.read(container))

    def _containers(self, value: Any, known: Container[int]) -> Iterator[tuple[Any, Kind]]:
        """The containers in a value and in what they held, but for those whose ids are known."""
        pending = [value]
        for value in pending:  # grows while it is walked
            if isinstance(value, tuple):
                pending += [item for item in value if type(item) not in _PLAIN]
                continue
            cls: Any = type(value)
            look = look_at(cls)
            # The modules of the tree are looked at by themselves.
            if look is None or id(value) in self._modules:
                continue
            if look.attributes:
                pending.append(vars(value))
            if look.kind is not None and id(value) not in known:
                yield value, look.kind
                if id(value) in self._seen:
                    held = look.kind.items(self._seen[id(value)][2])
                    pending += [item for item in held if type(item) not in _PLAIN]

    def compare(self) -> None:
        """Find the containers that hold other objects than they held: ``changed``, by id."""
        self.changed = {id(container) for container in filter(None, self._empty)}
        for place, (container, kind, held) in self._seen.items():
            if not _holds_the_same(container, kind, held):
                self.changed.add(place)

    def changes_below(self, value: Any) -> Iterator[tuple[Any, Any]]:
        """Of the containers in a value and in these, what the ``changed`` ones held and hold."""
        visited: set[int] = set()
        for container, kind in self._containers(value, visited):
            visited.add(id(container))
            if id(container) in self.changed:
                yield self.before(container), kind.read(container)

    def before(self, container: Any) -> Any:
        """What was in the container, read as its kind is; None for an unknown one."""
        found = self._seen.get(id(container))
        if found is None and id(container) in self._were_empty:
            return type(container)()
        return found[2] if found is not None else None

    def restore(self) -> None:
        """Put back what was there, into the same containers."""
        for module, cls in self._named:  # it may have become what it replaced
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
        for container in filter(None, self._empty):
            container.clear()
        for container, kind, held in self._seen.values():
            if not _holds_the_same(container, kind, held):
                kind.write(container, held)


def _holds_the_same(container: Any, kind: Kind, held: Any) -> bool:
    return is_same(held, container if kind is MAPPING else kind.read(container))
