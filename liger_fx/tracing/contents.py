"""What mutable Python objects hold: how it is read, compared and put back.

{"n": 1}, [1], deque((1,)), {1}     their items
SimpleNamespace(n=1), Counter()     their attributes, as a dict or in slots
partial(f, k=2)                     its function and arguments
numpy.ones(3), bytearray(8)         a copy
"""

from __future__ import annotations

import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig


class Kind(NamedTuple):
    """How objects of a class are looked into.

    read: what one holds now. write: puts it back. items: the objects in what was read.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    items: Callable[[Any], Iterable[Any]]


def _update(mapping: Any, held: Any) -> None:
    mapping.clear()
    mapping.update(held)


def _extend(sequence: Any, held: Any) -> None:
    sequence.clear()
    sequence.extend(held)


def _set_attributes(owner: Any, held: dict[str, Any]) -> None:
    for name, value in held.items():
        setattr(owner, name, value)


def _fill(array: Any, held: Any) -> None:
    array[...] = held


def _overwrite(array: bytearray, held: bytes) -> None:
    array[:] = held


def _slots_of(owner: Any) -> dict[str, Any]:
    names = [n for cls in type(owner).__mro__ for n in getattr(cls, "__slots__", ())]
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def _parts_of(partial: functools.partial[Any]) -> dict[str, Any]:
    return {
        "func": partial.func,
        "args": partial.args,
        "keywords": partial.keywords,
        "attributes": vars(partial),
    }


def _set_parts(partial: Any, held: dict[str, Any]) -> None:
    partial.__setstate__(tuple(held.values()))


def _none(held: Any) -> Iterable[Any]:
    return ()


MAPPING = Kind(dict, _update, dict.values)
_SEQUENCE = Kind(list, _extend, iter)
_SET = Kind(set, _update, iter)
_SLOTS = Kind(_slots_of, _set_attributes, dict.values)
_PARTIAL = Kind(_parts_of, _set_parts, dict.values)
_ARRAY = Kind(np.copy, _fill, _none)
_BYTES = Kind(bytes, _overwrite, _none)
_BUILT_IN: dict[type, Kind] = {
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), MAPPING),
    **dict.fromkeys((list, deque), _SEQUENCE),
    set: _SET,
    functools.partial: _PARTIAL,
    np.ndarray: _ARRAY,
    bytearray: _BYTES,
}
# Of these packages' own objects none is a model's state, but modules.
_LIBRARIES = frozenset({"torch", "transformers", "triton", "numpy", "liger_fx", "accelerate",
                        "peft", *sys.stdlib_module_names}) - {"types", "collections"}  # fmt: skip


class Look(NamedTuple):
    """kind: of what an object holds as a container, if it does. attributes: whether it has some
    that are state, too."""

    kind: Kind | None
    attributes: bool


@functools.lru_cache(4096)
def look_at(cls: Any) -> Look | None:
    """How to look into an object of this class; None for what holds nothing that a model's code
    could change."""
    if cls in _BUILT_IN:
        return Look(_BUILT_IN[cls], False)
    if not _is_state(cls):
        return None
    kind = next((kind for base, kind in _BUILT_IN.items() if issubclass(cls, base)), None)
    if kind is None and any(vars(base).get("__slots__") for base in cls.__mro__):
        kind = _SLOTS
    attributes = cls.__dictoffset__ != 0
    return Look(kind, attributes) if kind or attributes else None


def _is_state(cls: type) -> bool:
    if issubclass(cls, nn.Module):
        return True
    # The values of a config are guarded, and losses write the kind of problem into theirs.
    if issubclass(cls, (PreTrainedConfig, type, torch.Tensor, BaseException, tuple)):
        return False
    return cls.__module__.partition(".")[0] not in _LIBRARIES


def is_same(then: Any, now: Any) -> bool:
    """Whether an object holds the very objects that it held: what ``read`` gave, and gives."""
    if isinstance(then, dict):
        ordered = len(then) == len(now) and (all(map(is_, then, now)) or list(then) == list(now))
        return ordered and all(map(is_, then.values(), now.values()))
    if isinstance(then, np.ndarray):
        return bool(
            then.dtype == now.dtype and np.array_equal(then, now, equal_nan=_may_be_nan(then))
        )
    if isinstance(then, bytes):
        return bool(then == now)
    if len(then) != len(now):
        return False
    if isinstance(then, set):
        return {id(item) for item in then} == {id(item) for item in now}
    return all(map(is_, then, now))


def _may_be_nan(array: Any) -> bool:
    return array.dtype.kind in "fc"
