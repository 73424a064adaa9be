"""Decoding steps with a static cache, replayed as a CUDA graph.

    opt.generate(ids, cache_implementation="static")
 ->
    prefill       the blocks' graphs, as any call
    first step    the same; it compiles kernels, makes plans
    second step   recorded as a CUDA graph, if it can be; else it runs as before, said once
    all others    one launch, as long as nothing that was recorded has changed

transformers asks a model for what its decoding steps shall run through (``get_compiled_call``), and
would compile it. A recording belongs to one cache, and goes with it.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from liger_fx.errors import FallbackWarning, one_line
from liger_fx.model.capture import Capture, CudaGraph, Graph, NotCapturable, outline
from liger_fx.model.standing import CacheState, TreeState
from liger_fx.tracing.garbage import garbage_kept
from liger_fx.tracing.tree_state import GLOBAL_HOOKS, hooks_of, is_capturing
from liger_fx.tracing.walk import modules_by_path

# What records for a type of device.
GRAPHS: dict[str, Any] = {"cuda": CudaGraph}
# Recordings kept at a time, those used last; each holds the memory of one step.
MOST = 4
# So often may a recording be of no use before its kind of step is left alone.
PATIENCE = 3
QUERIES = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")


class Recording:
    """A step that was recorded with these caches, and whether it may still be replayed.

    is_known: as a Capture takes it. on_loss: called when one of the caches is gone.
    """

    def __init__(
        self,
        block: Any,
        step: Any,
        caches: list[Cache],
        graph: Graph,
        is_known: bool,
        on_loss: Callable[[], None],
    ) -> None:
        tree, cache = TreeState(block), CacheState(caches)
        try:
            with cache.questions_refused():
                self.capture = Capture(lambda inputs: block(**inputs), step, graph, is_known)
            self._cache_stands, self._count_on = cache.settled()
            if not tree.stands():
                raise NotCapturable("each step changes attributes of its modules")
        except BaseException:
            cache.restore()
            tree.restore()
            raise
        self._tree_stands = tree.stands
        self._lengths = None if tree.is_written() else cache.lengths()
        self._caches = [weakref.ref(each, lambda _: on_loss()) for each in caches]
        self.replays = 0

    def replay(self, tensors: list[torch.Tensor], caches: list[Cache]) -> Any:
        """The result of the step for these tensors; None where what the recording took for granted
        is not as it was, and then nothing is done.

        Where a step can be taken back, the model is looked at while the GPU is at work.
        """
        is_first, can_take_back = not self.replays, self._lengths is not None
        if not (is_first or (self._cache_stands() and (can_take_back or self._tree_stands()))):
            return None
        result = self.capture.replay(tensors, caches)
        if can_take_back and not (is_first or self._tree_stands()):
            for length in self._lengths or ():  # the next step writes over what this one wrote
                length.sub_(1)
            return None
        if not is_first:  # the recording counted for the first replay, which follows it at once
            self._count_on()
        self.replays += 1
        return result


class Decoding:
    """What the decoding steps of one model run through.

    A kind of step is what a recording holds for: shapes, dtypes, plain arguments, modes.
    """

    def __init__(self) -> None:
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._met: deque[Hashable] = deque(maxlen=64)
        self._known: deque[Hashable] = deque(maxlen=64)
        self._refused: deque[Hashable] = deque(maxlen=64)
        self._not_now: set[Hashable] = set()
        self._in_vain: Counter[Hashable] = Counter()
        self._told: set[str] = set()
        self._pool: Any = None
        self._lock = threading.RLock()

    def call_of(self, block: Any) -> Callable[..., Any]:
        """What the steps of one generation run through."""
        self._not_now.clear()
        return functools.partial(self.step, block, block.device.type)

    def step(self, block: Any, device: str, /, **step: Any) -> Any:
        """``block(**step)``, by a recording of such a step if there can be one."""
        tensors: list[torch.Tensor] = []
        caches: list[Cache] = []
        try:
            kind = outline(step, tensors, caches), _modes(device)
            with self._lock:
                key = kind, *map(id, caches)
                recording = self._recordings.get(key)
                result = None if recording is None else recording.replay(tensors, caches)
                if result is None:
                    recording = self._recorded(block, step, caches, key)
                    result = None if recording is None else recording.replay(tensors, caches)
                if result is not None:
                    self._recordings.move_to_end(key)
                    return result
        except NotCapturable as reason:
            self._tell(block, str(reason))
        return block(**step)

    def _recorded(self, block: Any, step: Any, caches: list[Cache], key: Any) -> Recording | None:
        """A new recording of a step; None where it runs as any call: at first, and where it cannot
        be recorded."""
        kind = key[0]
        if key in self._recordings:
            self._drop(key)
        if kind in self._refused or kind in self._not_now or not _is_decoding(step):
            return None
        if kind not in self._met:  # kernels are compiled, plans are made
            self._met.append(kind)
            return None
        try:
            _check_tree(block, caches)
        except NotCapturable:
            self._not_now.add(kind)
            raise
        try:
            recording = self._record(block, step, caches, key)
        except (NotCapturable, RuntimeError) as reason:
            self._refused.append(kind)
            raise NotCapturable(one_line(reason)) from reason
        self._recordings[key] = recording
        while len(self._recordings) > MOST:
            self._recordings.popitem(last=False)
        return recording

    def _record(self, block: Any, step: Any, caches: list[Cache], key: Any) -> Recording:
        kind_of_graph, recordings = GRAPHS[block.device.type], weakref.ref(self._recordings)

        def forget() -> None:
            if (there := recordings()) is not None:
                there.pop(key, None)

        if not self._recordings:  # the memory of a pool goes with its last graph, and the pool
            self._pool = kind_of_graph.new_pool(block.device)
        # What dies in the midst of a recording would free memory that it uses.
        with garbage_kept():
            graph = kind_of_graph(block.device, self._pool)
            recording = Recording(block, step, caches, graph, key[0] in self._known, forget)
        if not recording.capture.needs_care:
            self._known.append(key[0])
        return recording

    def _drop(self, key: Any) -> None:
        """Forget a recording that does not stand any more; NotCapturable if that goes on and
        on."""
        kind, recording = key[0], self._recordings.pop(key)
        self._in_vain[kind] = 0 if recording.replays > PATIENCE else self._in_vain[kind] + 1
        if self._in_vain[kind] > PATIENCE:
            self._refused.append(kind)
            raise NotCapturable("what it was recorded with changes from step to step")

    def _tell(self, block: Any, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(
                f"{type(block).__name__}: its decoding steps are not replayed as a CUDA graph, and "
                f"run as any call: {reason}.",
                FallbackWarning,
                stacklevel=4,
            )


def get_compiled_call(block: Any, compile_config: Any) -> Callable[..., Any]:
    """What ``generate`` runs its decoding steps through where it would compile them; who asks for a
    way to compile gets that."""
    if compile_config is not None or block.device.type not in GRAPHS:
        compiled: Callable[..., Any] = block.block_class.get_compiled_call(block, compile_config)
        return compiled
    state = block._block
    if state.decoding is None:
        state.decoding = Decoding()
    found: Callable[..., Any] = state.decoding.call_of(block)
    return found


def _is_decoding(step: dict[str, Any]) -> bool:
    """Whether it is about one position of each sequence. (A chunk of a prompt is not.)"""
    given = [step[name] for name in QUERIES if isinstance(step.get(name), torch.Tensor)]
    return bool(given) and given[0].shape[1] == 1


def _modes(device: str) -> Hashable:
    """The modes of this thread, and of the process, that decide what a step computes, and how."""
    backends = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.are_deterministic_algorithms_enabled(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
    )


def _check_tree(block: nn.Module, caches: list[Cache]) -> None:
    """NotCapturable where a recording could not hold for the model as it is now."""
    if torch.is_grad_enabled():
        raise NotCapturable("gradients are on")
    if any(getattr(cache, "offloading", False) for cache in caches):
        raise NotCapturable("its cache is offloaded")
    if any(GLOBAL_HOOKS):
        raise NotCapturable("a hook stands on all modules")
    for path, module in modules_by_path(block).items():
        where = path or "the model"
        if any(not is_capturing(hook) for hooks in hooks_of(module) for hook in hooks.values()):
            raise NotCapturable(f"a hook stands on {where}")
        if "forward" in vars(module):
            raise NotCapturable(f"the forward of {where} is replaced by another, of accelerate's?")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            _check_tensor(tensor, ".".join(filter(None, (path, name))), block)


def _check_tensor(tensor: Any, where: str, block: Any) -> None:
    if tensor is None:
        return
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise NotCapturable(f"{where} is a {type(tensor).__name__}")
    if tensor.device != block.device:
        raise NotCapturable(f"{where} is on {tensor.device}, other parts on {block.device}")
