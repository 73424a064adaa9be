"""The few names of PyTorch and transformers that are replaced while a trace runs, and put back
after it.

Only the tracing thread takes the replaced paths: a model that another thread runs meanwhile
computes as ever.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers import masking_utils
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from liger_fx.tracing import leaves
from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.checks import record_check
from liger_fx.tracing.functions import functions_seen
from liger_fx.tracing.guards import MODES
from liger_fx.tracing.kinds import kinds_asked
from liger_fx.tracing.leaf_modules import run_on_fakes
from liger_fx.tracing.members import Members
from liger_fx.tracing.reach import reach_of
from liger_fx.tracing.recorder import Recorder, recorder_of_thread
from liger_fx.tracing.size_methods import message_of, patch_sizes
from liger_fx.tracing.torch_calls import is_model_code
from liger_fx.tracing.transformers_leaves import TransformersLeaves

_lock = threading.RLock()
_thread = threading.local()
_MISSING = object()


class Tracing(Protocol):
    """What the patches ask of the tracer that installed them."""

    members: Members
    recorder: Recorder
    leaves: TransformersLeaves

    def trace_module_call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What ``module(*args, **kwargs)`` does during the trace."""

    def failed(self, error: BaseException) -> None:
        """Take note of what went wrong in a call that the model's code made."""

    def is_hidden(self, module: nn.Module, name: str) -> bool:
        """Whether the code that reads this attribute must not see it."""

    def note_read(self, module: nn.Module, name: str) -> None:
        """The model's code reads this attribute."""

    def note_made(self, module: nn.Module) -> None:
        """The model's code makes a module."""

    def note_hook(self, handle: RemovableHandle) -> None:
        """The model's code puts a hook on a module, or on a tensor."""

    def note_write(self, module: nn.Module, name: str) -> None:
        """The model's code writes this attribute, a child's or a tensor's name."""

    def enter_autocast(self, region: torch.autocast) -> None:
        """Record the start of an autocast region."""

    def leave_autocast(self, region: torch.autocast) -> None:
        """Record its end."""


class Aside(NamedTuple):
    """An int of a module that is symbolic in the thread that traces, and itself in all others."""

    value: int
    size: Any


_aside: dict[tuple[int, str], Aside] = {}


@contextmanager
def put_aside(module: nn.Module, name: str, size: Any) -> Iterator[None]:
    """Within ``patched``, the attribute is ``size`` to this thread's code; others may run the
    module meanwhile."""
    place = id(module), name
    value = module.__dict__[name]
    _aside[place] = Aside(value, size)
    del module.__dict__[name]
    try:
        yield
    finally:
        module.__dict__.setdefault(name, value)
        del _aside[place]


def recording_tracer() -> Tracing | None:
    """The tracer of this thread, if it is recording at the moment."""
    tracer: Tracing | None = getattr(_thread, "tracer", None)
    return tracer if tracer is not None and tracer.recorder.recording else None


def is_tracing() -> bool:
    """Whether a trace is under way in this thread."""
    return getattr(_thread, "tracer", None) is not None


class _OfNoTrace(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not is_tracing()


@contextmanager
def _failures_not_logged() -> Iterator[None]:
    """PyTorch logs each operator that takes no fake tensors of some sizes as an error; a trace
    raises what it could not mend by other sizes itself."""
    log, traces = logging.getLogger("torch._subclasses.fake_tensor"), _OfNoTrace()
    log.addFilter(traces)
    try:
        yield
    finally:
        log.removeFilter(traces)


@contextmanager
def patched(tracer: Tracing) -> Iterator[None]:
    """Install the patches for one trace; a second thread that wants to trace waits here."""
    with _lock, ExitStack() as stack:
        saved: list[tuple[Any, str, Any]] = []

        def replace(owner: Any, name: str, value: Any) -> None:
            # Saved before it is set: an interrupt between the two restores what is already there.
            saved.append((owner, name, owner.__dict__.get(name, _MISSING)))
            setattr(owner, name, value)

        outer = getattr(_thread, "tracer", None)
        try:
            _thread.tracer = tracer
            stack.enter_context(functions_seen())
            stack.enter_context(_failures_not_logged())
            reaches = [r for module in tracer.members.entered.values() for r in reach_of(module)]
            stack.enter_context(kinds_asked(reaches))
            _patch_modules(replace)
            _patch_questions(replace)
            patch_sizes(replace)
            _patch_attributes(replace)
            _patch_autocast(replace)
            _patch_attention(replace)
            _patch_caches(replace)
            _patch_mask_builders(replace, tracer.members.entered.values())
            _patch_checks(replace)
            _patch_refused(replace)
            yield
        finally:
            _thread.tracer = outer
            _restore(saved)


def _restore(saved: list[tuple[Any, str, Any]]) -> None:
    interrupted: BaseException | None = None
    while saved:
        owner, name, value = saved[-1]
        try:
            if value is _MISSING:
                if name in owner.__dict__:
                    delattr(owner, name)
            else:
                setattr(owner, name, value)
            saved.pop()
        except KeyboardInterrupt as interrupt:  # finish restoring first, then let it through
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted


def _patch_modules(replace: Any) -> None:
    original = nn.Module.__call__

    @functools.wraps(original)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = recording_tracer()
        if tracer is not None:
            try:
                return tracer.trace_module_call(module, args, kwargs)
            except BaseException as error:
                tracer.failed(error)
                raise
        if is_tracing():
            # Nothing is recorded, but no hook may see what a trace works with.
            return run_on_fakes(module, args, kwargs)
        return original(module, *args, **kwargs)

    replace(nn.Module, "__call__", call)
    if "__call__" in GradientCheckpointingLayer.__dict__:
        checkpointed = GradientCheckpointingLayer.__call__

        @functools.wraps(checkpointed)
        def call_layer(module: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
            if is_tracing():
                return nn.Module.__call__(module, *args, **kwargs)
            return checkpointed(module, *args, **kwargs)

        replace(GradientCheckpointingLayer, "__call__", call_layer)


def _patch_questions(replace: Any) -> None:
    original = torch.is_grad_enabled

    @functools.wraps(original)
    def is_grad_enabled() -> bool:
        tracer = recording_tracer()
        if tracer is not None:
            tracer.recorder.facts.ask_about_gradients()
        return original()

    replace(torch, "is_grad_enabled", is_grad_enabled)
    for name in MODES:
        replace(torch, name, _asking(name))
    hashed = torch.Tensor.__hash__

    def hash_of(tensor: torch.Tensor) -> int:
        if recording_tracer() is not None and is_model_code(sys._getframe(1).f_code):
            raise CannotRecord("a tensor is looked up in a dictionary or set")
        return hashed(tensor)

    replace(torch.Tensor, "__hash__", hash_of)


def _asking(name: str) -> Any:
    original = MODES[name]

    @functools.wraps(original)
    def ask() -> Any:
        tracer = recording_tracer()
        return original() if tracer is None else tracer.recorder.facts.ask_mode(name)

    return ask


def _patch_attributes(replace: Any) -> None:
    original = nn.Module.__getattr__

    @functools.wraps(original)
    def look_up(module: nn.Module, name: str) -> Any:
        tracer = recording_tracer()
        if tracer is not None and tracer.is_hidden(module, name):
            # No AttributeError: hasattr would take it for an answer.
            owner = type(module).__name__
            raise CannotRecord(f"{name} of a {owner}, whose forward changes it, is read outside")
        aside = _aside.get((id(module), name))
        if aside is not None:
            return aside.size if is_tracing() else aside.value
        return original(module, name)

    replace(nn.Module, "__getattr__", look_up)
    get, init = nn.Module.__getattribute__, nn.Module.__init__

    @functools.wraps(init)
    def make(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        tracer = recording_tracer()
        if tracer is not None:
            tracer.note_made(module)
        init(module, *args, **kwargs)

    def read(module: nn.Module, name: str) -> Any:
        tracer = recording_tracer()
        if tracer is not None and is_model_code(sys._getframe(1).f_code):
            tracer.note_read(module, name)
        return get(module, name)

    replace(nn.Module, "__getattribute__", read)
    replace(nn.Module, "__init__", make)
    for writer in ("__setattr__", "__delattr__", "add_module", "register_buffer"):
        replace(nn.Module, writer, _noting_writes(getattr(nn.Module, writer)))
    replace(RemovableHandle, "__init__", _noting_hooks(RemovableHandle.__init__))


def _noting_hooks(init: Any) -> Any:
    @functools.wraps(init)
    def noting(handle: RemovableHandle, *args: Any, **kwargs: Any) -> None:
        init(handle, *args, **kwargs)
        tracer = recording_tracer()
        if tracer is not None:
            tracer.note_hook(handle)

    return noting


def _noting_writes(write: Any) -> Any:
    @functools.wraps(write)
    def noting(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
        tracer = recording_tracer()
        if tracer is not None and "_modules" in module.__dict__:
            tracer.note_write(module, name)
        write(module, name, *args, **kwargs)

    return noting


def _patch_autocast(replace: Any) -> None:
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    @functools.wraps(enter)
    def traced_enter(region: torch.autocast) -> Any:
        tracer = recording_tracer()
        if tracer is not None:
            tracer.enter_autocast(region)
        return enter(region)

    @functools.wraps(leave)
    def traced_leave(region: torch.autocast, *exception: Any) -> Any:
        tracer = recording_tracer()
        if tracer is not None:
            tracer.leave_autocast(region)
        return leave(region, *exception)

    replace(torch.autocast, "__enter__", traced_enter)
    replace(torch.autocast, "__exit__", traced_leave)


def _patch_checks(replace: Any) -> None:
    """The checks that code makes of its data by functions for it: they are nodes."""

    def traced(original: Any) -> Any:
        @functools.wraps(original)
        def check(error: Any, condition: Any, message: Any = None) -> None:
            recorder = recorder_of_thread()
            if recorder is None:
                original(error, condition, message)
            elif isinstance(condition, bool):
                if message is not None:
                    message_of(recorder, message)
                original(error, condition, message)
            else:
                record_check(recorder, error, condition, message)

        return check

    for name in ("_check_with", "_check_tensor_all_with"):
        replace(torch, name, traced(getattr(torch, name)))


def _patch_refused(replace: Any) -> None:
    """What changes how later operations compute, or draws numbers of its own, and has no node."""

    def refusing(original: Any, what: str) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if recorder_of_thread() is not None:
                raise CannotRecord(what)
            return original(*args, **kwargs)

        return call

    for owner, name, what in _REFUSED:
        if name in vars(owner):
            replace(owner, name, refusing(getattr(owner, name), what))


_SEEDS = ("manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed", "set_rng_state",
          "set_rng_state_all", "fork_rng")  # fmt: skip
_REFUSED: list[tuple[Any, str, str]] = [
    (torch.inference_mode, "__enter__", "a region of torch.inference_mode"),
    (
        saved_tensors_hooks,
        "__enter__",
        "a checkpointed function (or another region of saved_tensors_hooks): a graph would keep "
        "what it frees",
    ),
    (contextlib.suppress, "__enter__", "a region of contextlib.suppress"),
    (np.random, "default_rng", "numpy.random.default_rng, a generator of random numbers"),
    *(
        (owner, name, f"torch.{name}, which changes what random numbers are drawn")
        for owner in (torch, torch.random, torch.cuda, torch.cuda.random)
        for name in _SEEDS
    ),
]


def _patch_attention(replace: Any) -> None:
    # Models of early transformers 5 look it up by index, later ones by get_interface.
    name = "get_interface" if hasattr(AttentionInterface, "get_interface") else "__getitem__"
    original = getattr(AttentionInterface, name)

    @functools.wraps(original)
    def look_up(self: Any, implementation: str, *default: Any) -> Any:
        interface = original(self, implementation, *default)
        tracer = recording_tracer()
        if tracer is None:
            return interface
        eager = default[0] if default else None
        return functools.partial(tracer.leaves.attention, interface, implementation, eager)

    replace(AttentionInterface, name, look_up)


def _patch_caches(replace: Any) -> None:
    init = DynamicCache.__init__

    @functools.wraps(init)
    def traced_init(cache: DynamicCache, *args: Any, **kwargs: Any) -> None:
        tracer = recording_tracer()
        if tracer is None or type(cache) is not DynamicCache:
            init(cache, *args, **kwargs)
        else:
            tracer.leaves.new_cache(init, cache, args, kwargs)

    init_pair = EncoderDecoderCache.__init__

    @functools.wraps(init_pair)
    def traced_init_pair(cache: EncoderDecoderCache, *caches: Any) -> None:
        tracer = recording_tracer()
        if tracer is None or len(caches) != 2:
            init_pair(cache, *caches)
        else:
            tracer.leaves.new_cache_pair(init_pair, cache, caches)

    replace(DynamicCache, "__init__", traced_init)
    replace(EncoderDecoderCache, "__init__", traced_init_pair)


def _patch_mask_builders(replace: Any, modules: Iterable[nn.Module]) -> None:
    """Mask builders are imported by name, so each modelling file of the model holds its own
    reference."""
    builders = {
        (builder := getattr(masking_utils, name)): _traced_mask_builder(name, builder)
        for name in leaves.MASK_BUILDERS
    }
    for module in _modelling_files(modules):
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in builders:
                replace(module, name, builders[value])


def _traced_mask_builder(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        tracer = recording_tracer()
        if tracer is None:
            return original(*args, **kwargs)
        return tracer.leaves.mask(name, original, args, kwargs)

    return build


def _modelling_files(modules: Iterable[nn.Module]) -> set[Any]:
    classes = {cls for module in modules for cls in type(module).__mro__}
    names = {cls.__module__ for cls in classes} - {masking_utils.__name__, "builtins"}
    return {
        sys.modules[name] for name in names if name in sys.modules and not name.startswith("torch.")
    }
