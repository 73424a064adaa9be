"""Python's state outside the modules that a model's code may read and change, while a trace runs.

counter["n"] += 1            a global, a closure, a class's attribute: put back, and the module
                             that changed it stays one that is called
next(ids); level.get()       what cannot be looked into without a change: its module is called
table(8), with a cache       computed without its cache (it would keep fake tensors)
"""

from __future__ import annotations

import contextvars
import copy
import functools
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from liger_fx.tracing.fakes import FakeWorld
from liger_fx.tracing.reach import Place, Reach, is_cached, reach_of
from liger_fx.tracing.recorder import recorder_of_thread
from liger_fx.tracing.root_state import Snapshot
from liger_fx.tracing.state import same

Key = tuple[int, str]
_ENVIRONMENT = frozenset({"environ", "getenv"})
_LIVE = (contextvars.ContextVar, Iterator, random.Random, np.random.Generator,
         np.random.RandomState, torch.Generator, threading.local)  # fmt: skip


class Outside:
    """What code can touch, as it is now. ``written``: places that some of it is known to change."""

    def __init__(self, reaches: Iterable[Reach], written: frozenset[Key]) -> None:
        self.written = written
        self._snapshot = Snapshot()
        self._then: dict[Key, tuple[Place, Any]] = {}
        for reach in reaches:
            for place in reach.places:
                if place.key not in self._then:
                    value = place.value()
                    self._then[place.key] = place, value
                    self._snapshot.take(value)

    def changed(self, world: FakeWorld) -> Place | None:
        """A place where something else is than was, or holds something else."""
        self._snapshot.compare()
        for place, then in self._then.values():
            now = place.value()
            if then is now and not self._snapshot.changed:
                continue
            if not same(self._snapshot, world, then, now):
                return place
        return None

    def restore(self) -> None:
        """Put everything back."""
        for place, then in self._then.values():
            if place.value() is not then:
                place.put(then)
        self._snapshot.restore()

    def reason_to_call(self, module: nn.Module) -> str:
        """Why the code of a module is not to be followed; "" where it may be."""
        live = next((p for p in _live(module)), None)
        if live is not None:
            return f"its code reads {live.name}, a {type(live.value()).__name__}"
        for reach in reach_of(module):
            if not _ENVIRONMENT.isdisjoint(reach.names):
                return "its code reads the environment of the process"
            for place in reach.places:
                if place.key in self.written:
                    return f"its code reads {place.name}, which changes from call to call"
        return ""

    @contextmanager
    def kept(self, module: nn.Module) -> Iterator[None]:
        """What the code of a module below does inside leaves no trace: it is done again when the
        graph runs. TypeError where something cannot be copied for that."""
        lent = [(place, place.value()) for m in module.modules() for place in _live(m)]
        try:
            for place, value in lent:
                place.put(_copied(value))
            yield
        finally:
            for place, value in lent:
                place.put(value)
            self.restore()


def _live(module: nn.Module) -> Iterator[Place]:
    """Where the module's code finds objects that change as they are read."""
    own = [name for name, value in module.__dict__.items() if _is_live(value)]
    for reach in reach_of(module):
        yield from (Place(module.__dict__, name) for name in own if name in reach.names)
        yield from (place for place in reach.places if _is_live(place.value()))


def _is_live(value: Any) -> bool:
    cls: Any = type(value)
    return _is_live_class(cls)


@functools.lru_cache(4096)
def _is_live_class(cls: Any) -> bool:
    return issubclass(cls, _LIVE)


def _copied(value: Any) -> Any:
    if isinstance(value, contextvars.ContextVar):
        return value  # a trace runs in a context of its own
    if isinstance(value, torch.Generator):
        return value.clone_state()
    # numpy's share their bits with a shallow copy, an iterator's deep copy would copy tensors.
    is_numpys = type(value).__module__.startswith("numpy")
    return copy.deepcopy(value) if is_numpys else copy.copy(value)


@contextmanager
def caches_bypassed(reaches: Iterable[Reach]) -> Iterator[None]:
    """Within, functions with a cache compute without it in this thread."""
    thread, replaced = threading.get_ident(), list[tuple[Place, Any]]()

    def bypassing(cached: Any) -> Any:
        @functools.wraps(cached)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return cached(*args, **kwargs)
            if (recorder := recorder_of_thread()) is not None:
                recorder.facts.note_twins(f"{cached.__name__} has a cache")
            return cached.__wrapped__(*args, **kwargs)

        return call

    try:
        for place in (place for reach in reaches for place in reach.caches):
            if is_cached(value := place.value()):
                replaced.append((place, value))
                is_static = isinstance(value, staticmethod)
                place.put(
                    staticmethod(bypassing(value.__func__)) if is_static else bypassing(value)
                )
        yield
    finally:
        for place, value in replaced:
            place.put(value)
