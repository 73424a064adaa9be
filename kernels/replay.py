"""What an operator starts, started again without deciding anew what that is.

The layout of rows, the tiles, what Triton compiled: all of it follows from the kind of the
arguments, that is the shapes, strides, dtypes and alignment of the tensors, and the values of what
else is given. To find it again takes longer than a small kernel runs.

    first call of a kind     computes: Triton compiles
    second                   computes, and what it allocates and launches is written down
    all others               allocate and launch, no more
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_fx.kernels.launch import INTERPRETED, Started, launches_noted

_ATEN = torch.ops.aten
_ALLOCATIONS = (_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty)
# Kinds that one operator remembers; with one more it begins anew.
MOST = 1024


class Replayed:
    """`run`, of tensors that Triton serves by a replay where that is all it does.

    run: takes plain values and tensors, of which the first argument is one; gives one tensor or a
    tuple of them, all its own.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self._again: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        first = args[0]
        if not (first.is_cuda and first.get_device() == torch.cuda.current_device() or INTERPRETED):
            return self.run(*args)
        kind = _kind(args)
        again = self._again.get(kind)
        if again is not None:
            return again(*args)
        if len(self._again) >= MOST:
            self._again.clear()
        self._again[kind] = functools.partial(self._noting, kind)
        return self.run(*args)

    def _noting(self, kind: Hashable, *args: Any) -> Any:
        with _Notes(args) as notes, launches_noted() as launches:
            result = self.run(*notes.args)
        self._again[kind] = notes.replay(launches, result) or self.run
        return result


def _kind(args: tuple[Any, ...]) -> Hashable:
    """What decides which work a call is: Triton compiles for pointers to multiples of 16."""
    kind: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            kind += arg.shape, arg.stride(), arg.dtype, arg.get_device(), arg.data_ptr() & 15
        else:
            kind.append(arg)
    return tuple(kind)


class _Notes(TorchDispatchMode):
    """Writes down what is allocated; `args` are to be worked on."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        # Each another object, whatever was given twice: an argument is known again by that.
        self.args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        self.tensors = [a for a in self.args if isinstance(a, torch.Tensor)]
        self.made: list[torch.Tensor] = []
        self.is_all = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.made.append(result)
        elif not func.is_view and _has_tensors((args, kwargs, result)):
            self.is_all = False
        return result

    def replay(self, launches: list[Started | None], result: Any) -> _Replay | None:
        """The work as it was written down; None if it was more, or if it is not clear on what."""
        results = result if isinstance(result, tuple) else (result,)
        places = [self._place(each) for each in results]
        steps = [None if each is None else self._step(each) for each in launches]
        if not self.is_all or None in places or None in steps:
            return None
        return _Replay(
            tuple(i for i, a in enumerate(self.args) if isinstance(a, torch.Tensor)),
            [(t.shape, t.stride(), t.dtype) for t in self.made],
            [step for step in steps if step is not None],
            [len(self.tensors) + place for place in places if place is not None],
            isinstance(result, tuple),
        )

    def _step(self, started: Started) -> _Step | None:
        slots = []
        for i, arg in enumerate(started.args):
            if isinstance(arg, torch.Tensor):
                source = self._source(arg)
                if source is None:
                    return None
                slots.append((i, *source))
        return _Step(started.start, list(started.args), slots)

    def _source(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Which of the tensors it is a part of, and how many bytes from that one's first element.

        One that was given is known by itself, for several may lie in one memory. What was allocated
        or viewed is told by its memory, if no other lies there."""
        known = self.tensors + self.made
        there = [i for i, other in enumerate(known) if other is tensor]
        there = there or [i for i, other in enumerate(known) if _memory(other) == _memory(tensor)]
        if len(there) != 1:
            return None
        return there[0], tensor.data_ptr() - known[there[0]].data_ptr()

    def _place(self, tensor: torch.Tensor) -> int | None:
        """Which of the allocations it is, as a whole."""
        facts = _facts(tensor)
        return next((i for i, other in enumerate(self.made) if _facts(other) == facts), None)


def _has_tensors(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in tree_leaves(values))


def _facts(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Step(NamedTuple):
    """One launch. slots: where tensors stand among `args`, which they are, and the bytes to add."""

    start: Callable[..., None]
    args: list[Any]
    slots: list[tuple[int, int, int]]


class _Replay(NamedTuple):
    """inputs: where the tensors stand among the arguments. allocations: shape, stride and dtype of
    each. results: which of the tensors, those allocated after those given."""

    inputs: tuple[int, ...]
    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    steps: list[_Step]
    results: list[int]
    is_tuple: bool

    def __call__(self, *args: Any) -> Any:
        tensors = [args[i] for i in self.inputs]
        device = tensors[0].device
        for shape, stride, dtype in self.allocations:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        for start, given, slots in self.steps:
            filled = given.copy()
            for i, source, offset in slots:
                filled[i] = _pointer(tensors[source], offset)
            start(*filled)
        if self.is_tuple:
            return tuple([tensors[i] for i in self.results])
        return tensors[self.results[0]]


def _pointer(tensor: torch.Tensor, offset: int) -> Any:
    """What a compiled kernel takes for a tensor: its address, and asks no more. The interpreter
    wants a tensor."""
    if not INTERPRETED:
        return tensor.data_ptr() + offset
    start = tensor.storage_offset() + offset // tensor.element_size()
    return tensor.as_strided((1,), (1,), start) if offset else tensor
