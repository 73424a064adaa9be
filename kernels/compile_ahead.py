"""Kernels that are compiled before they are launched, side by side.

    with CompileAhead(): rms_norm(fake x, fake weight, ...)
 ->
    Triton compiles, in a thread for each, what such a call would launch; nothing is computed

Triton compiles a kernel at its first launch, in half a second. A training step launches a dozen of
them, one after the other.
"""

import contextlib
import threading
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_started = set[tuple[Any, ...]]()
_threads: dict[tuple[Any, ...], threading.Thread] = {}


class CompileAhead(FakeTensorMode):
    """Within it the operators of this folder work as on real tensors, up to the launches. (A real
    tensor, a constant that an operator keeps, is taken for a fake one.)"""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


def compiles_ahead() -> bool:
    """Whether this thread is in CompileAhead."""
    return isinstance(torch._C._get_dispatch_mode(_FAKE), CompileAhead)


def refuse_ahead() -> None:
    """RuntimeError in CompileAhead: for who would keep a tensor for later calls."""
    if compiles_ahead():
        raise RuntimeError("tensors without numbers are not kept")


@triton.jit
def _nothing():
    pass


def start_triton(index: int) -> None:
    """Compile a kernel of nothing in another thread: the first one takes another second, for what
    Triton imports, asks of the device and hashes of its own files."""
    start_compiling((id(_nothing), index), _nothing, index, (), {})


def start_compiling(
    key: tuple[Any, ...], kernel: Any, index: int, args: tuple[Any, ...], constants: Any
) -> None:
    """Compile a Triton kernel for such arguments on the device of that index in another thread.

    key: what tells one compilation from another, the kernel's id first.
    """
    if key in _started:
        return
    _started.add(key)
    # For a dtype Triton takes a tensor that begins at a multiple of 16 bytes.
    kinds = [arg.dtype if isinstance(arg, FakeTensor) else arg for arg in args]

    def compile_and_load() -> None:
        # What fails here fails again where it is launched, if it is; there it is told.
        with contextlib.suppress(Exception), torch.cuda.device(index):
            _ = kernel.warmup(*kinds, grid=(1,), **constants).run

    _threads[key] = threading.Thread(target=compile_and_load, name=f"compiles {kernel.__name__}")
    _threads[key].start()


def wait_for(kernel: Any) -> None:
    """Wait until what is compiled of this kernel is there. (What the key tells apart may be one to
    Triton.)"""
    for key in [key for key in _threads if key[0] == id(kernel)]:
        if (thread := _threads.pop(key, None)) is not None:
            thread.join()
