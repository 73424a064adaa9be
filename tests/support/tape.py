"""A stand-in for a CUDA graph on the CPU: what was recorded is computed again on the same memory.

    with recording_on_cpu() as tapes: opt.generate(ids, cache_implementation="static")

As a CUDA graph it computes nothing while it is recorded, refuses to read a tensor's numbers then,
runs no Python when it is replayed, and knows no other memory than that which it was recorded on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation import GenerationMixin

from liger_fx.model import decoding


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tape:
    """Records operators and does them again; ``replays`` counts how often."""

    made: list[Tape]

    def __init__(self, device: torch.device, pool: Any) -> None:
        self.steps: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0
        self.made.append(self)

    @staticmethod
    def new_pool(device: torch.device) -> None:
        return None

    def record(self, work: Callable[[], Any]) -> Any:
        recorder = _Recorder(self.steps)
        try:
            with recorder:
                return work()
        finally:
            recorder.undo()

    def wait(self) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.steps:
            for old, new in zip(made, tensors_in(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    """Writes operators down; what they write over is put back by ``undo``."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(named.get(argument.name)):
                    self._keep(tensor)
        result = func(*args, **kwargs)
        if not func.is_view:
            self.steps.append((func, args, kwargs, tensors_in(result)))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.written:
            self.written[storage.data_ptr()] = storage, storage.clone()

    def undo(self) -> None:
        for storage, before in self.written.values():
            storage.copy_(before)


@contextmanager
def recording_on_cpu() -> Iterator[list[Tape]]:
    """Within it, decoding steps on the CPU are recorded where those on a GPU would be; gives the
    tapes that are made."""

    def compiles(self: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        cache = model_kwargs.get("past_key_values")
        return not generation_config.disable_compile and bool(
            getattr(cache, "is_compileable", False)
        )

    made: list[Tape] = []
    with (
        mock.patch.object(Tape, "made", made, create=True),
        mock.patch.dict(decoding.GRAPHS, {"cpu": Tape}),
        mock.patch.object(GenerationMixin, "_valid_auto_compile_criteria", compiles),
    ):
        yield made
