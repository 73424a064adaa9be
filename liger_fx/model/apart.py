"""Work done apart from what the calling thread is in the middle of.

    torch.func.grad(loss)(weights)      the trace of a block that loss calls is not differentiated
    torch.export.export(opt, ...)       ... and no part of the program

Transforms of torch.func, dispatch modes and what the compiler traces belong to a thread: a thread
of its own has none of them.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_the_midst() -> bool:
    """Whether a transform of torch.func or a dispatch mode sees what this thread computes."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None or torch._C._len_torch_dispatch_stack() > 0


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """``work(*args)`` in a thread of its own with this thread's grad and autocast modes."""
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
            return work(*args)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, run).result()
