"""What a trace must find on the model, and must leave as it found it."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from liger_fx.tracing.tree_state import is_capturing
from liger_fx.tracing.walk import modules_by_path

_alone = threading.RLock()
_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, set, deque))


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
        try:
            yield before
        finally:
            if modules is not None and RemovableHandle.next_id != first:
                _remove_collecting_hooks(root, first)
            before.restore()


def _remove_collecting_hooks(root: nn.Module, first: int) -> None:
    """Those of transformers, from that number on."""
    for module in modules_by_path(root).values():
        hooks = module._forward_hooks
        for number in [n for n, hook in hooks.items() if n >= first and is_capturing(hook)]:
            del hooks[number]


class Snapshot:
    """All attributes of some modules: parameters, buffers, children, plain values, and what is in
    the dictionaries, lists and sets among them. No tensor's data is copied."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._seen: dict[int, tuple[Any, Any]] = {}
        self._empty: list[Any] = []
        for module in modules:
            attributes = module.__dict__
            self._seen[id(attributes)] = (attributes, dict(attributes))
            for value in attributes.values():
                if type(value) in _CONTAINERS and not value:  # most are: the hooks
                    self._empty.append(value)
                else:
                    self._take(value)
        self._were_empty = set(map(id, self._empty))

    def _take(self, value: Any) -> None:
        if type(value) in _CONTAINERS:
            if id(value) in self._seen:
                return
            # The container is kept as well: its id must not be reused.
            self._seen[id(value)] = (value, _contents(value))
            items = value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            items = value
        else:
            return
        for item in items:
            self._take(item)

    def before(self, container: Any) -> Any:
        """What was in the container: a dict, list or set of its own; None for an unknown one."""
        found = self._seen.get(id(container))
        if found is None and id(container) in self._were_empty:
            return type(container)()
        return found[1] if found is not None else None

    def restore(self) -> None:
        """Put back what was there, into the same containers."""
        for container in filter(None, self._empty):
            container.clear()
        for container, contents in self._seen.values():
            if not _same(container, contents):
                container.clear()
                (container.extend if isinstance(contents, list) else container.update)(contents)


def _contents(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _same(container: Any, contents: Any) -> bool:
    if len(container) != len(contents):
        return False
    if isinstance(contents, set):
        return {id(item) for item in container} == {id(item) for item in contents}
    if isinstance(contents, dict) and not all(map(operator.eq, container, contents)):
        return False
    now = container.values() if isinstance(contents, dict) else container
    then = contents.values() if isinstance(contents, dict) else contents
    return all(map(operator.is_, now, then))
