"""What every kernel launch here shares: when Triton runs, on which device, and in what tiles."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from liger_fx.kernels.compile_ahead import start_compiling, wait_for

TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# TRITON_INTERPRET=1 runs Triton's kernels on the CPU, in Python. triton.jit reads it once, when a
# kernel is defined, so this module does too.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """How one kernel is spread over a GPU; the functions that choose one are `*_launch`.

    rows and cols: the tile of one program in one step, both powers of two.
    warps: of 32 threads, per program.
    per_sm: programs per multiprocessor, for kernels whose programs loop over tiles.
    stages: tiles being loaded at once by such a loop (1: no prefetch).
    """

    rows: int
    cols: int
    warps: int
    per_sm: int = 1
    stages: int = 1


def uses_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton kernels serve these tensors; PyTorch's operations serve all others.

    It takes CUDA tensors (any tensors under Triton's interpreter) of float32, bfloat16 or float16.
    """
    on_gpu = INTERPRETED
    for t in tensors:
        if t is not None:
            if not (on_gpu := on_gpu or t.is_cuda):
                return False
            if t.dtype not in TRITON_DTYPES:
                return False
    return on_gpu


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """What the maths is done in: float64 if a tensor is, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype is torch.float64:
            return torch.float64
    return torch.float32


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a CUDA device; 2 under the interpreter, so that loops share work."""
    return _multiprocessors(device.index) if device.type == "cuda" else 2


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Start `programs` programs of a Triton kernel on `device`, whichever device is current."""
    if isinstance(args[0], FakeTensor):
        key = _key(kernel, device, args, constants)
        if key not in _compiled and not _is_misaligned(args):
            start_compiling(key, kernel, device.index, args, constants)
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _start(kernel, programs, device, args, constants)
    else:
        _start(kernel, programs, device, args, constants)


class Started(NamedTuple):
    """A launch: `start(*args)` does it, and does it again with other tensors of the same kinds, or
    with their addresses, among `args`."""

    start: Callable[..., None]
    args: tuple[Any, ...]


class _Noted(threading.local):
    """The launches of this thread, while somebody wants to know of them."""

    launches: list[Started | None] | None = None


_noted = _Noted()


@contextmanager
def launches_noted() -> Iterator[list[Started | None]]:
    """A list of the launches inside; None for one that cannot be started again so."""
    before, _noted.launches = _noted.launches, []
    try:
        yield _noted.launches
    finally:
        _noted.launches = before


def _note(started: Started | None) -> None:
    if _noted.launches is not None:
        _noted.launches.append(started)


# What Triton compiled a kernel to, and the constants that it takes, by all that it depends on.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _start(
    kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], constants: Any
) -> None:
    """`kernel[(programs,)](*args, **constants)`, which takes 14 microseconds to find again what it
    compiled for such arguments; to ask here first takes a quarter of that."""
    if INTERPRETED:
        start = functools.partial(kernel[(programs,)], **constants)
        with torch._C._DisableTorchDispatch():  # its copies are its own affair
            start(*args)
        _note(Started(start, args))
        return
    key = _key(kernel, device, args, constants)
    if (found := _compiled.get(key)) is not None:
        compiled, rest = found
        compiled[programs, 1, 1](*args, *rest)
        _note(Started(_starter(compiled, programs, device.index), (*args, *rest)))
        return
    wait_for(kernel)
    compiled = kernel[(programs,)](*args, **constants)
    _note(None)
    if torch.version.cuda is not None:
        given = {name: p.default for name, p in kernel.signature.parameters.items()} | constants
        rest = tuple(given[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled, rest


def _starter(compiled: Any, programs: int, device: int) -> Callable[..., None]:
    """`compiled[programs, 1, 1]`, which for a launch spends more than the launch itself on who may
    want to see it: nobody, as a rule."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    knobs, stream_of = triton.knobs.runtime, triton.runtime.driver.active.get_current_stream
    observed = compiled[programs, 1, 1]

    def start(*args: Any) -> None:
        hook = knobs.launch_enter_hook
        if getattr(hook, "calls", hook):  # since Triton 3.5 always a chain of them
            observed(*args)
        else:
            run(programs, 1, 1, stream_of(device), function, metadata, None, None, None, *args)

    return start


def _key(
    kernel: Any, device: torch.device, args: tuple[Any, ...], constants: Any
) -> tuple[Any, ...]:
    return (id(kernel), device.index, *constants, *constants.values(), *_kinds(args))


def _is_misaligned(args: tuple[Any, ...]) -> bool:
    return any(_address(arg) & 15 for arg in args if isinstance(arg, torch.Tensor))


def _address(tensor: torch.Tensor) -> int:
    """Where the tensor begins; of a fake one, in its memory."""
    if type(tensor) is FakeTensor:
        return int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()


def _kinds(args: tuple[Any, ...]) -> list[Any]:
    """All of the arguments that Triton compiles for (on CUDA), and a little more: the dtype of a
    tensor and how it is aligned; of an int, whether it is 1, fits 32 bits, and what of 16 is left.
    """
    kinds: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is int:
            is_usual = arg != 1 and -(2**31) <= arg < 2**31
            kinds.append(arg & 15 if is_usual else (arg == 1, arg & 15))
        elif isinstance(arg, torch.Tensor):
            kinds += arg.dtype, _address(arg) & 15
        else:
            kinds.append(kind)
    return kinds
