"""One run of a function on the GPU, recorded as a CUDA graph and replayed on other tensors.

    capture = Capture(lambda step: model(**step), {"input_ids": ids, ...}, CudaGraph(device, pool))
    capture.replay([other_ids, ...], [cache])    ->   what the function would return for them

Python runs once, while it is recorded; a replay costs one launch. Inputs are copied to where the
recorded run read its own, and what it returned is copied for the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.inner_blocks import rebuilt


class NotCapturable(Exception):
    """What cannot be recorded once and replayed; its text says why."""


class Graph(Protocol):
    """What records work for a device and runs it again."""

    def record(self, work: Callable[[], Any]) -> Any:
        """The result of ``work()``: tensors that ``replay`` will fill. Nothing is computed."""

    def wait(self) -> None:
        """Have what follows wait for replays that still run elsewhere, on the same memory."""

    def replay(self) -> None:
        """Do again what was recorded, on the same memory."""


class Pool:
    """Memory that graphs share, given back when the last of them goes; ``stream`` is where one of
    them was replayed last."""

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.current_stream(device)


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream that is recorded: one, for cuBLAS keeps 32 MB for each that it meets."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """A CUDA graph with its tensors in a pool."""

    new_pool = Pool

    def __init__(self, device: torch.device, pool: Pool) -> None:
        self.device, self.pool = device, pool
        self.graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; other threads may use the GPU meanwhile."""
        with torch.cuda.device(self.device):
            here, aside = torch.cuda.current_stream(), _aside(self.device)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self.graph.capture_begin(self.pool.handle, capture_error_mode="thread_local")
                try:
                    result = work()
                finally:
                    self.graph.capture_end()
            here.wait_stream(aside)
        return result

    def wait(self) -> None:
        """A program may go on with another stream; the memory that graphs share is one."""
        here = torch.cuda.current_stream(self.device)
        if self.pool.stream != here:
            here.wait_stream(self.pool.stream)
            self.pool.stream = here

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


class Capture:
    """A recorded run. ``inputs`` is a tree of tensors, caches and plain values.

    is_known: work of this kind was recorded before, and nothing in it needed care.
    needs_care: whether something in it did.
    """

    def __init__(
        self, work: Callable[[Any], Any], inputs: Any, graph: Graph, is_known: bool = False
    ) -> None:
        self.graph = graph
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        places: dict[int, _Place] = {}

        def keep_place(cache: Cache) -> Cache:
            places[id(cache)] = _Place(len(places))
            return cache

        def place_of(cache: Cache) -> _Place:
            if id(cache) not in places:
                raise NotCapturable("it returns a cache other than the one that it is given")
            return places[id(cache)]

        step = mapped(inputs, self._input_for, keep_place)
        constants = _FilledConstants()

        def with_care() -> Any:
            with _Watch(), constants:
                return work(step)

        result = graph.record((lambda: work(step)) if is_known else with_care)
        self.needs_care = constants.has_filled
        self.result = mapped(result, self._output_of, place_of)

    def replay(self, tensors: list[torch.Tensor], caches: list[Cache]) -> Any:
        """The result of the recorded work for these inputs, in the order of the first."""
        self.graph.wait()
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return self._filled(self.result, caches)

    def _input_for(self, given: torch.Tensor) -> torch.Tensor:
        kept = torch.empty(given.shape, dtype=given.dtype, device=given.device)
        self.inputs.append(kept.copy_(given))
        return kept

    def _output_of(self, tensor: torch.Tensor) -> _Place:
        self.outputs.append(tensor)
        return _Place(len(self.outputs) - 1, is_tensor=True)

    def _filled(self, result: Any, caches: list[Cache]) -> Any:
        """The outcome with copies of the tensors: the next replay writes over them."""
        if isinstance(result, _Place):
            place = result.place
            return self.outputs[place].clone() if result.is_tensor else caches[place]
        if isinstance(result, dict):
            items = [self._filled(item, caches) for item in result.values()]
            return rebuilt(type(result), tuple(result), items)
        if isinstance(result, (tuple, list)):
            return rebuilt(type(result), None, [self._filled(item, caches) for item in result])
        return result


class _Place:
    """Where a tensor or a cache stands in what is returned."""

    def __init__(self, place: int, is_tensor: bool = False) -> None:
        self.place, self.is_tensor = place, is_tensor


def mapped(value: Any, tensor: Callable[[torch.Tensor], Any], cache: Callable[[Cache], Any]) -> Any:
    """A tree of values with others for its tensors and caches; NotCapturable for what is neither,
    nor plain."""
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
        return tensor(value)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Cache):
        return cache(value)
    if isinstance(value, dict):
        items = [mapped(item, tensor, cache) for item in value.values()]
        return rebuilt(type(value), tuple(value), items)
    if isinstance(value, (tuple, list)):
        return rebuilt(type(value), None, [mapped(item, tensor, cache) for item in value])
    raise NotCapturable(f"it takes or returns a {type(value).__name__}")


def outline(value: Any, tensors: list[torch.Tensor], caches: list[Cache]) -> Hashable:
    """What a tree of values is like, but for the numbers in its tensors; these and its caches are
    added to the lists. NotCapturable for what ``mapped`` refuses."""
    if type(value) is torch.Tensor:
        tensors.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Cache):
        caches.append(value)
        return type(value), None
    if isinstance(value, dict):
        items = (outline(item, tensors, caches) for item in value.values())
        return type(value), tuple(value), *items
    if isinstance(value, (tuple, list)):
        return type(value), *(outline(item, tensors, caches) for item in value)
    raise NotCapturable(f"it takes a {type(value).__name__}")


class _Watch(TorchDispatchMode):
    """Refuses, before it is done, what a recording would take for a constant or cannot hold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, tags = kwargs or {}, func.tags
        if torch.Tag.data_dependent_output in tags:
            raise NotCapturable(f"{func.overloadpacket} asks for the numbers in a tensor")
        if torch.Tag.dynamic_output_shape in tags and _has_sizes_of_data(func, args, kwargs):
            raise NotCapturable(f"the sizes that {func.overloadpacket} gives depend on numbers")
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(kinds) > 1 and torch.Tag.pointwise not in tags:
            raise NotCapturable(f"{func.overloadpacket} works on several devices")
        return result


def _has_sizes_of_data(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator that may give sizes of that kind does: an index of numbers does not, one
    of truth values does."""
    with FakeTensorMode() as fakes:

        def fake(leaf: Any) -> Any:
            return fakes.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

        try:
            func(*tree_map(fake, args), **tree_map(fake, kwargs))
        except DynamicOutputShapeException:
            return True
    return False


class _FilledConstants(TorchFunctionMode):
    """A small tensor of given numbers is filled where it lies: a recording cannot hold its way from
    the CPU.

    torch.tensor([-1], device="cuda")   ->   torch.empty(1, device="cuda"), filled with -1
    """

    MOST = 8
    has_filled = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        self.has_filled = True
        constant = torch.tensor(*args, **{**kwargs, "device": "cpu"})
        if constant.numel() > self.MOST:
            raise NotCapturable(f"{constant.numel()} numbers are copied from the CPU")
        filled = torch.empty(constant.shape, dtype=constant.dtype, device=kwargs["device"])
        for place, number in zip(filled.view(-1), constant.flatten().tolist(), strict=True):
            place.fill_(number)
        return filled
