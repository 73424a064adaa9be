"""The random numbers of Python, numpy and PyTorch's default generator, from which a trace must not
draw: a graph would hold what came that day.

    if random.random() < self.layerdrop: ...     the module stays one that is called
    torch.manual_seed(7); torch.randn(3)         refused at once (patches.py)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


class Streams:
    """Where the streams stand. While a trace runs they stand one number further, so that code which
    seeds them as they were seeded before shows as well."""

    def __init__(self) -> None:
        self._then = _states()
        random.random()
        np.random.random()
        torch.rand(())
        self._apart = _states()

    def drawn(self) -> str:
        """Whose numbers were drawn or seeded since; "" if nobody's."""
        pairs = zip(_NAMES, self._apart, _states(), strict=True)
        return next((name for name, then, now in pairs if not _same(then, now)), "")

    def restore(self) -> None:
        """Put them back where they stood."""
        _put(self._then)


@contextmanager
def streams_kept() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards."""
    states = _states()
    try:
        yield
    finally:
        _put(states)


_NAMES = "Python's random numbers", "numpy's random numbers", "PyTorch's default generator"


def _states() -> tuple[Any, Any, torch.Tensor]:
    with _no_modes():
        return (
            random.getstate(),
            np.random.get_state(legacy=True),
            torch.default_generator.get_state(),
        )


def _put(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    with _no_modes():
        torch.default_generator.set_state(states[2])


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, torch.Tensor):
        with _no_modes():
            return torch.equal(then, now)
    if isinstance(then, np.ndarray):
        return bool(np.array_equal(then, now))
    if isinstance(then, tuple) and any(isinstance(item, np.ndarray) for item in then):
        return all(map(_same, then, now))
    return bool(then == now)


@contextmanager
def _no_modes() -> Iterator[None]:
    """A trace looks while its own modes are on, too."""
    with torch._C.DisableTorchFunction(), unset_fake_temporarily():
        yield
