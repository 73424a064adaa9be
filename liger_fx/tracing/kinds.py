"""What Python says of the class of a trace's values, and of who they are: what it says of real
ones.

    type(x) is torch.Tensor         True of a fake; at a call every tensor given must be plain
    isinstance(x.shape[0], int)     True of a symbolic size
    type(past_key_values)           that of the example, of which each call must be
    id(x), x.__class__              refused

``type``, ``isinstance`` and ``id`` are C code that no mode sees. The files whose code names them
get others of these names while a trace runs; other threads are answered as ever.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.numbers import TracedFloat, TracedInt
from liger_fx.tracing.reach import Reach, made_by
from liger_fx.tracing.recorder import recorder_of_thread
from liger_fx.tracing.stand_ins import origin_of

_type, _isinstance, _id = type, isinstance, id
_NUMBERS: dict[type, type] = {
    torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool,
    TracedInt: int, TracedFloat: float,
}  # fmt: skip
_EXAMPLES = {int: 2, float: 2.0, bool: True}
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


def class_of_value(value: Any) -> type:
    """The class that the value has in a real call; CannotRecord where none is known."""
    kind = _type(value)
    if kind is FakeTensor:
        _ask_class(value, torch.Tensor)
        return _tensor_class(value)
    if issubclass(kind, torch.Tensor):
        _ask_class(value, kind)
    if (origin := origin_of(value)) is not None:
        return _type(origin.example)
    return value.block_class if is_block(value) else _NUMBERS.get(kind, kind)


def _tensor_class(fake: FakeTensor) -> type[torch.Tensor]:
    return nn.Parameter if getattr(fake, "_is_param", False) else torch.Tensor


def _ask_class(tensor: torch.Tensor, kind: type) -> None:
    recorder = recorder_of_thread()
    if recorder is not None:
        recorder.facts.note(tensor, "__class__", "class", kind)


def _is_instance(value: Any, classes: Any) -> bool:
    """``isinstance(value, classes)`` of what the value stands for."""
    classes = _real_classes(classes)
    kind = _type(value)
    if classes is torch.Tensor:
        return _isinstance(value, torch.Tensor)
    if kind is FakeTensor:
        own = _tensor_class(value)
        answers = {cls: _isinstance(_tensor_of(cls, value.dtype), classes) for cls in _TENSORS}
        if len({*answers.values()}) > 1:
            _ask_class(value, own)
        return answers[own]
    if issubclass(kind, torch.Tensor):
        _ask_class(value, kind)
    elif (origin := origin_of(value)) is not None:
        return _isinstance(origin.example, classes)
    elif kind in _NUMBERS:
        return _isinstance(_EXAMPLES[_NUMBERS[kind]], classes)
    return _isinstance(value, classes)


def _real_classes(classes: Any) -> Any:
    if _isinstance(classes, tuple):
        return tuple(map(_real_classes, classes))
    return _type if classes is _shadows["type"] else classes


@functools.lru_cache(64)
def _tensor_of(cls: Any, dtype: torch.dtype) -> torch.Tensor:
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():
        empty = torch.empty(0, dtype=dtype)
        if cls is torch.Tensor:
            return empty
        made: torch.Tensor = cls(empty, requires_grad=False) if cls is nn.Parameter else cls(empty)
        return made


def _identity(value: Any) -> int:
    if _isinstance(value, torch.Tensor):
        raise CannotRecord("id of a tensor is asked")
    return _id(value)


_OF_ANY_CALLABLE = ("__module__", "__name__", "__qualname__", "__doc__")  # a class has more


def _in_a_trace(asked: Any, traced: Callable[..., Any], arguments: int) -> Callable[..., Any]:
    """``traced`` for the code that a trace runs, in calls with so many arguments."""

    @functools.wraps(asked, _OF_ANY_CALLABLE, updated=())
    def ask(*args: Any, **kwargs: Any) -> Any:
        is_question = len(args) == arguments and not kwargs and recorder_of_thread() is not None
        return (traced if is_question else asked)(*args, **kwargs)

    return ask


_shadows: dict[str, Callable[..., Any]] = {
    "type": _in_a_trace(type, class_of_value, 1),
    "isinstance": _in_a_trace(isinstance, _is_instance, 2),
    "id": _in_a_trace(id, _identity, 1),
}


@contextmanager
def kinds_asked(reaches: Iterable[Reach]) -> Iterator[None]:
    """Within, what this code asks of its values' classes is answered by what they stand for."""
    functions = {function for reach in reaches for function in reach.code}
    placed: list[tuple[dict[str, Any], str]] = []
    try:
        for function in functions:
            scope = function.__globals__
            for name in _asked_by(function.__code__) - scope.keys():
                placed.append((scope, name))
                scope[name] = _shadows[name]
        yield
    finally:
        for scope, name in placed:
            scope.pop(name, None)


@functools.lru_cache(4096)
def _asked_by(code: CodeType) -> frozenset[str]:
    return (frozenset(code.co_names) & _shadows.keys()).union(*map(_asked_by, made_by(code)))


# -- what no name can be given another meaning for -------------------------------------------------


def reads_class(reaches: Iterable[Reach]) -> bool:
    """Whether code that is reached reads ``__class__`` of anything but what hangs on its first
    argument (self), or has a ``case`` of a class, which reads it."""
    return any(_reads_class(function.__code__) for reach in reaches for function in reach.code)


@functools.lru_cache(4096)
def _reads_class(code: CodeType) -> bool:
    if any(map(_reads_class, made_by(code))):
        return True
    owner: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "MATCH_CLASS":
            return True
        if step.opname == "LOAD_ATTR" and step.argval == "__class__":
            if owner not in code.co_varnames[:1]:
                return True
        elif step.opname not in ("LOAD_ATTR", "CACHE"):
            owner = step.argval if step.opname.startswith("LOAD_FAST") else None
    return False
