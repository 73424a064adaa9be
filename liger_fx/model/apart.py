"""Work done apart from what the calling thread is in the middle of.

    torch.func.grad(loss)(weights)      the trace of a block that loss calls is not differentiated
    torch.export.export(opt, ...)       ... and no part of the program

Transforms of torch.func, dispatch modes and what the compiler traces belong to a thread: a thread
of its own has none of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from liger_fx.tracing.call import UnsupportedCall
from liger_fx.tracing.inner_blocks import rebuilt


def in_the_midst() -> bool:
    """Whether a transform of torch.func, a mode or torch.jit.trace sees what this thread
    computes."""
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return interpreter is not None or modes > 0 or torch.jit.is_tracing()


def apart(work: Callable[[], Any]) -> Any:
    """``work()`` in a thread of its own with this thread's grad and autocast modes; nothing
    tells it that anything is compiled."""
    grad_enabled, device = torch.is_grad_enabled(), torch.get_default_device()
    accelerator = torch.accelerator.current_accelerator()
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", *([] if accelerator is None else [accelerator.type]))
    ]

    def run() -> Any:
        torch.set_grad_enabled(grad_enabled)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        with contextlib.nullcontext() if device.type == "cpu" else device:
            return work()

    # The modes of torch.export's own dispatch key are those of the whole process.
    with _nothing_compiles(), _disable_current_modes(), ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, run).result()


@contextlib.contextmanager
def _nothing_compiles() -> Iterator[None]:
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    try:
        torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags


def of_plain_sizes(value: Any) -> Any:
    """A tree of values with other fake tensors for those in it, whose sizes are the numbers of the
    call that is traced or compiled: they guard nothing when they are asked. UnsupportedCall for a
    size that data decides."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        if value.node.hint is None:
            raise UnsupportedCall("a size that depends on data")
        return value.node.hint
    if isinstance(value, FakeTensor):
        with _fakes():
            shape, strides = map(tuple, map(of_plain_sizes, (value.shape, value.stride())))
            made = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        items = [of_plain_sizes(item) for item in value.values()]
        return rebuilt(type(value), tuple(value), items)
    if isinstance(value, (tuple, list)):
        return rebuilt(type(value), None, [of_plain_sizes(item) for item in value])
    return value


@functools.cache
def _fakes() -> FakeTensorMode:
    return FakeTensorMode()
