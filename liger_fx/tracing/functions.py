"""torch.autograd.Function in a model's code: what its author wrote as the backward stays.

    Reverse.apply(x)                 ->   apply_function("pkg.reverse:Reverse", x)
    checkpoint(f, x), reentrant      ->   refused: a graph would keep what a checkpoint frees
                                          (without gradients: f(x), followed)

Models keep ``reverse = Reverse.apply`` in a name of their own, so that replacing the method on its
class would not be enough: the code of the one function behind all of these is exchanged.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from liger_fx.tracing import leaves
from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.memo import run_without_grad
from liger_fx.tracing.recorder import Recorder, recorder_of_thread
from liger_fx.tracing.torch_calls import tensor_ids

_METHOD: Any = torch.autograd.Function.__dict__["apply"].__func__
# The method as PyTorch has it, also while its own code is another.
_apply = types.FunctionType(
    _METHOD.__code__, _METHOD.__globals__, "apply", _METHOD.__defaults__, _METHOD.__closure__
)


def _exchanged() -> types.CodeType:
    __class__ = None

    def apply(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        __class__  # noqa: B018  (PyTorch's own code has this cell)
        from liger_fx.tracing.functions import applied

        return applied(cls, args, kwargs)

    return apply.__code__


@contextmanager
def functions_seen() -> Iterator[None]:
    """Within, calls of Functions are recorded by the recorder of their thread, if there is one."""
    own = _METHOD.__code__
    try:
        _METHOD.__code__ = _exchanged()
        yield
    finally:
        _METHOD.__code__ = own


def applied(cls: Any, args: Any, kwargs: Any) -> Any:
    """``cls.apply(*args, **kwargs)``, recorded where a trace asks for it."""
    recorder = recorder_of_thread()
    checkpoints = cls.__module__ == CheckpointFunction.__module__
    if recorder is None or (checkpoints and cls is not CheckpointFunction):
        return _apply(cls, *args, **kwargs)
    if checkpoints and not torch.is_grad_enabled():
        return args[0](*args[2:])
    try:
        if checkpoints:
            raise CannotRecord("a checkpointed function: a graph would keep what it frees")
        return _record(recorder, cls, args, kwargs)
    except BaseException as error:
        recorder.owner.failed(error)
        raise


def _record(recorder: Recorder, cls: Any, args: Any, kwargs: Any) -> Any:
    with recorder.unrecorded():
        args, kwargs = recorder.with_fakes(args), recorder.with_fakes(kwargs)
        before, tensors = _state((args, kwargs)), tensor_ids((args, kwargs))
        node = recorder.create_node(
            "call_function",
            leaves.apply_function,
            (importable(cls), *map(recorder.argument, args)),
            {key: recorder.argument(value) for key, value in kwargs.items()},
        )
        result = run_without_grad(lambda: _apply(cls, *args, **kwargs))
        if before != _state((args, kwargs)):
            raise CannotRecord(f"{cls.__name__}, an autograd.Function that changes its arguments")
        return recorder.bind(result, node, tensors)


def _state(arguments: Any) -> list[tuple[int, int]]:
    """What the lists and tensors among arguments hold, to be compared later."""
    held = pytree.tree_leaves(arguments)
    return [(id(v), v._version if isinstance(v, torch.Tensor) else 0) for v in held]


def importable(cls: type) -> str:
    """The ``module:qualified.name`` under which ``leaves.resolve`` finds the class."""
    try:
        return leaves.reference_to(cls)
    except LookupError as error:
        raise CannotRecord(str(error)) from error
