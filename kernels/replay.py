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

from liger_fx.kernels.compile_ahead import compiles_ahead
from liger_fx.kernels.launch import INTERPRETED, Started, launches_noted

_ATEN = torch.ops.aten
_ALLOCATIONS = (_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty)
# torch.cuda.current_device asks first whether CUDA is there.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# Kinds that one operator remembers; with one more it begins anew.
MOST = 1024


class Replayed:
    """`run`, of tensors that Triton serves by a replay where that is all it does.

    run: takes plain values and tensors, of which the first argument is one; gives one tensor or a
    tuple of them, all its own. plain: what gives the same of tensors that are not on a GPU, if
    `run` would have to find out first that they are not.
    """

    def __init__(self, run: Callable[..., Any], plain: Callable[..., Any] | None = None) -> None:
        self.run = run
        self.plain = plain or run
        self._again: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if not INTERPRETED:
            first = args[0]
            if not first.is_cuda:
                return self.plain(*args)
            if first.get_device() != _current_device() or compiles_ahead():
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
        try:
            self._again[kind] = notes.replay(launches, result)
        except _NotAll:
            self._again[kind] = self.run
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


class _NotAll(Exception):
    """There was more than allocations and launches, or it is not clear on what."""


class _Slot(NamedTuple):
    """Where a launch takes a tensor: `offset` bytes from the first element of the tensor `name`."""

    name: str
    offset: int


class _Notes(TorchDispatchMode):
    """Writes down what is allocated while `args`, which are others for the same, are worked on."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        # Each another object, whatever was given twice: an argument is known again by that.
        self.args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        self.tensors = {f"a{i}": a for i, a in enumerate(self.args) if isinstance(a, torch.Tensor)}
        self.made: dict[str, torch.Tensor] = {}
        self.is_all = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.made[f"made{len(self.made)}"] = result
        elif not func.is_view and _has_tensors((args, kwargs, result)):
            self.is_all = False
        return result

    def replay(self, launches: list[Started | None], result: Any) -> Callable[..., Any]:
        """A function of such arguments that does what was written down."""
        if not self.is_all:
            raise _NotAll
        source = _Source(len(self.args))
        for name, tensor in self.made.items():
            source.allocate(name, tensor)
        for launch in launches:
            if launch is None:
                raise _NotAll
            args = [self._slot(a) if isinstance(a, torch.Tensor) else a for a in launch.args]
            source.launch(launch.start, args)
        if isinstance(result, tuple):
            return source.function(f"{', '.join(map(self._made, result))},")
        return source.function(self._made(result))

    def _slot(self, tensor: torch.Tensor) -> _Slot:
        """One that was given is known by itself, for several may lie in one memory. What was
        allocated or viewed is told by its memory, if no other lies there."""
        known = self.tensors | self.made
        there = [name for name, other in known.items() if other is tensor]
        there = there or [n for n, other in known.items() if _memory(other) == _memory(tensor)]
        if len(there) != 1:
            raise _NotAll
        return _Slot(there[0], tensor.data_ptr() - known[there[0]].data_ptr())

    def _made(self, tensor: torch.Tensor) -> str:
        """Which of the allocations it is, as a whole."""
        facts = _facts(tensor)
        found = [name for name, other in self.made.items() if _facts(other) == facts]
        if not found:
            raise _NotAll
        return found[0]


def _has_tensors(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in tree_leaves(values))


def _facts(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Source:
    """The function as Python source: a replay looks nothing up."""

    def __init__(self, arguments: int) -> None:
        self.scope: dict[str, Any] = {"empty_strided": torch.empty_strided, "view": _view}
        self.lines = [f"def replay({', '.join(f'a{i}' for i in range(arguments))}):"]

    def allocate(self, name: str, like: torch.Tensor) -> None:
        dtype, device = self._constant(like.dtype), self._constant(like.device)
        layout = f"{tuple(like.shape)}, {like.stride()}, dtype={dtype}, device={device}"
        self.lines.append(f"    {name} = empty_strided({layout})")

    def launch(self, start: Callable[..., None], args: list[Any]) -> None:
        passed = (_address(a) if isinstance(a, _Slot) else self._constant(a) for a in args)
        self.lines.append(f"    {self._constant(start)}({', '.join(passed)})")

    def function(self, result: str) -> Callable[..., Any]:
        exec("\n".join([*self.lines, f"    return {result}"]), self.scope)
        made: Callable[..., Any] = self.scope["replay"]
        return made

    def _constant(self, value: Any) -> str:
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name


def _address(slot: _Slot) -> str:
    """What a compiled kernel takes for a tensor: its address, and asks no more. The interpreter
    wants a tensor."""
    if INTERPRETED:
        return f"view({slot.name}, {slot.offset})"
    return f"{slot.name}.data_ptr()" + (f" + {slot.offset}" if slot.offset else "")


def _view(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    start = tensor.storage_offset() + offset // tensor.element_size()
    return tensor.as_strided((1,), (1,), start) if offset else tensor
