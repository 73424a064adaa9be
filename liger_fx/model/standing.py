"""Whether what a recorded run took for granted still stands: a model's tree, a cache's memory.

    opt.to(torch.float16); layer.mlp = other; lora.set_adapter("b"); a hook; a config's value
    cache.reorder_cache(beams); a sliding window that is full now
 ->
    the recording is of no use any more

It is asked at every step, as one compiled check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from liger_fx.model.capture import NotCapturable
from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.check import Check
from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.tree_state import add_configs, add_no_hooks
from liger_fx.tracing.walk import modules_by_path


class TreeState:
    """A model's modules: their places, attributes and hooks, their tensors' memory, their configs.

    stands: whether all of it is as it was.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = modules_by_path(root)
        self._before = [(vars(module), dict(vars(module))) for module in modules.values()]
        self._versions: list[tuple[torch.Tensor, int | None]] = []
        check = Check()
        add_no_hooks(check, list(modules.values()))
        for module, (held, before) in zip(modules.values(), self._before, strict=True):
            if module._modules:
                check.add("{} == {}", module._modules, dict(module._modules))
            own = {name: value for name, value in held.items() if name not in _OWN}
            loose = {name: v for name, v in own.items() if isinstance(v, torch.Tensor)}
            for place, tensors in (
                (module._parameters, module._parameters),
                (module._buffers, module._buffers),
                (held, loose),
            ):
                for name, tensor in tensors.items():
                    _add_tensor(check, place, name, tensor)
                    if tensor is not None:
                        self._versions.append((tensor, _version(tensor)))
            if module._modules or not type(module).__module__.startswith(OPTIONS_STAY):
                _add_containers(check, own)
                check.add("{} == {}", held, before)
            else:
                check.add(f"{{}}['training'] is {module.training}", held)
            if is_block(module):
                state = held["_block"]
                check.add("{}.alike is {}", state, state.alike)
        add_configs(check, modules)
        self._holds = check.compiled()

    def is_written(self) -> bool:
        """Whether a tensor of the model was written to since then, or may have been."""
        versions = self._versions
        return any(then is None or _version(tensor) != then for tensor, then in versions)

    def stands(self) -> bool:
        try:
            return self._holds()
        except (RuntimeError, ValueError, TypeError):  # attributes that do not compare, as arrays
            return False

    def restore(self) -> None:
        """Put attributes back as they were."""
        for held, before in self._before:
            for name in held.keys() - before.keys():
                del held[name]
            held.update(before)


def _version(tensor: torch.Tensor) -> int | None:
    """What counts the writes to a tensor; tensors of inference mode have none."""
    return None if tensor.is_inference() else tensor._version


# Modules without others inside from here (linear layers, norms) keep what they were made with, as a
# graph takes it as well; they are most of a model's modules.
OPTIONS_STAY = ("torch.nn.", "liger_fx.modules.")
_OWN = frozenset(vars(nn.Module()))


def _add_tensor(check: Check, held: dict[str, Any], name: str, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        check.add("{}.get({}) is None", held, name)
        return
    # Module.to moves a parameter's numbers, and leaves the parameter.
    condition = "{}.get({}) is {} and {}() == {}"
    check.add(condition, held, name, tensor, tensor.data_ptr, tensor.data_ptr())


def _add_containers(check: Check, held: dict[str, Any]) -> None:
    """Add that dictionaries and lists of plain values hold what they held."""
    for value in held.values():
        if isinstance(value, (dict, list, set)):
            items = value.values() if isinstance(value, dict) else value
            if all(isinstance(item, PLAIN) for item in items):
                check.add("{} == {}", value, copy.copy(value))


class CacheState:
    """The caches of a step: where their tensors lie, and what Python knows of them.

    StaticSlidingWindowLayer counts its tokens in Python, but works by that count in two ways only:
    while it fills up, and when it is full. Each replay counts on.
    """

    def __init__(self, caches: list[Cache]) -> None:
        self.objects = [part for cache in caches for part in _parts(cache)]
        self.before = [dict(vars(part)) for part in self.objects]

    @contextmanager
    def questions_refused(self) -> Iterator[None]:
        """NotCapturable where the model asks a layer for a length that is counted in Python: it
        would be a constant of the recording."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotCapturable("its code asks how long a sliding window cache is")

        counting = [part for part in self.objects if type(part) is StaticSlidingWindowLayer]
        for part in counting:
            part.get_seq_length = part.get_mask_sizes = refuse
        try:
            yield
        finally:
            for part in counting:
                del part.get_seq_length, part.get_mask_sizes

    def restore(self) -> None:
        """Put back what Python knew before the recording."""
        for part, before in zip(self.objects, self.before, strict=True):
            vars(part).clear()
            vars(part).update(before)

    def lengths(self) -> list[torch.Tensor] | None:
        """What counts the positions of each layer, where a step that is done again with one less
        does the same; None where not."""
        layers = [part for part in self.objects if not isinstance(part, Cache)]
        if any(type(layer) is not StaticLayer for layer in layers):
            return None
        return [layer.cumulative_length for layer in layers]

    def settled(self) -> tuple[Callable[[], bool], Callable[[], None]]:
        """After the recording, and before its first replay: what tells whether the caches stand as
        it found them, and what counts a replay. NotCapturable where it changed what Python knows of
        them otherwise. (Neither keeps the caches alive.)"""
        check = Check()
        counts: list[tuple[dict[str, Any], int]] = []
        for part, before in zip(self.objects, self.before, strict=True):
            now, is_counting = vars(part), type(part) is StaticSlidingWindowLayer
            for name in before.keys() | now.keys():
                value = before.get(name)
                if name == COUNT and is_counting:
                    step = part.cumulative_length_int - before[COUNT]
                    counts.append((now, step))
                    _add_count(check, now, step)
                elif not _same(now.get(name), value):
                    kind = type(part).__name__
                    raise NotCapturable(f"each step changes {name} of its {kind} in Python")
                elif isinstance(value, torch.Tensor):
                    _add_tensor(check, now, name, value)
                elif is_counting:
                    check.add("{}({}.get({}), {})", _same, now, name, value)
            _add_containers(check, now)
            if not is_counting:
                check.add("{} == {}", now, before)

        def count_on() -> None:
            for held, step in counts:
                held[COUNT] += step

        return check.compiled(), count_on


def _add_count(check: Check, layer: dict[str, Any], step: int) -> None:
    """Add that the layer is full, or not yet after one more step, as it was at the recording."""
    after, most = layer[COUNT], layer["max_cache_len"]
    if after - step >= most:
        check.add(f"{{}}[{COUNT!r}] >= {most}", layer)
    elif after <= most:
        check.add(f"{{}}[{COUNT!r}] <= {most - step}", layer)
    else:
        raise NotCapturable("a sliding window becomes full in the midst of its step")


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(other, PLAIN) and one == other)


COUNT = "cumulative_length_int"


def _parts(cache: Cache) -> list[Any]:
    """The cache and the layers in it, each with attributes of its own."""
    if isinstance(cache, EncoderDecoderCache):
        inner = (cache.self_attention_cache, cache.cross_attention_cache)
        return [cache, *(part for each in inner for part in _parts(each))]
    return [cache, *cache.layers]
