"""Each kind of operation is inferred once: layer 2 of a model costs a dictionary look-up per
operation.

A result's metadata follows from the operation, the metadata of its tensor arguments and the values
of the others. The first time, PyTorch's fake kernels work it out; after that the answer is a
template:

    linear(float32[b, s, 64], float32[64, 64])  ->  float32[b, s, 64], fresh
    x.add_(y)                                   ->  argument 0 itself
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from liger_fx.tracing.fakes import FakeWorld, Metadata, as_expr

_PLAIN = (
    int, float, bool, str, bytes, complex, type(None), type(Ellipsis), torch.dtype, torch.device,
    torch.layout, torch.memory_format,
)  # fmt: skip


class Unknowable(Exception):
    """An argument or result whose part in the operation has no hashable description."""


class _Argument(NamedTuple):
    """The result is the tensor argument of this position itself."""

    position: int


class _Sequence(NamedTuple):
    kind: type
    items: tuple[Any, ...]


class _Constant(NamedTuple):
    value: Any


class Memo:
    """Results of operations by what they depend on; valid for one trace."""

    def __init__(self, world: FakeWorld) -> None:
        self.world = world
        self._templates: dict[Hashable, Any] = {}

    def infer(self, operation: Hashable, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """The result of ``run()``, from memory where the same operation met the same metadata.

        ``args`` and ``kwargs`` hold fakes only (no real tensors).
        """
        parts: list[Hashable] = [operation]
        tensors: list[FakeTensor] = []
        try:
            self._describe(args, parts, tensors)
            self._describe(kwargs, parts, tensors)
        except Unknowable:
            return run_without_grad(run)
        key = tuple(parts)
        template = self._templates.get(key)
        if template is None:
            result = run_without_grad(run)
            with contextlib.suppress(Unknowable):
                positions = {id(t): i for i, t in enumerate(tensors)}
                self._templates[key] = self._template(result, positions)
            return result
        return self._instance(template, tensors)

    def _describe(self, value: Any, parts: list[Hashable], tensors: list[FakeTensor]) -> None:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None:
                raise Unknowable  # the fake kernels may compute with its value
            tensors.append(value)
            parts.append(id(self.world.metadata(value)))
        elif kind in _PLAIN:
            parts.append((kind, value))
        elif kind is tuple or kind is list or kind is torch.Size:
            parts.append((kind, len(value)))
            for item in value:
                self._describe(item, parts, tensors)
        elif kind is dict:
            parts.append((dict, tuple(value)))
            for item in value.values():
                self._describe(item, parts, tensors)
        elif kind is slice:
            parts.append(slice)
            for item in (value.start, value.stop, value.step):
                self._describe(item, parts, tensors)
        elif isinstance(value, torch.SymInt):
            parts.append(("size", as_expr(value)))
        else:
            raise Unknowable

    def _template(self, result: Any, positions: dict[int, int]) -> Any:
        if isinstance(result, torch.Tensor):
            if id(result) in positions:
                return _Argument(positions[id(result)])
            if type(result) is not FakeTensor or result.constant is not None:
                raise Unknowable
            metadata = self.world.metadata(result)
            if any(_is_unbacked(size) for size in metadata.spec.shape):
                raise Unknowable  # each run makes a size of its own
            return metadata
        if type(result) in (tuple, list):
            return _Sequence(
                type(result), tuple(self._template(item, positions) for item in result)
            )
        if type(result) in _PLAIN:
            return _Constant(result)
        raise Unknowable

    def _instance(self, template: Any, tensors: list[FakeTensor]) -> Any:
        if isinstance(template, Metadata):
            return self.world.new(template)
        if isinstance(template, _Argument):
            return tensors[template.position]
        if isinstance(template, _Sequence):
            return template.kind(self._instance(item, tensors) for item in template.items)
        return template.value


def run_without_grad(run: Callable[[], Any]) -> Any:
    """Metadata needs no autograd graph; the grad mode that the model's code sees stays what it
    was."""
    with torch.no_grad():
        return run()


def _is_unbacked(size: Any) -> bool:
    return not isinstance(size, int) and any(str(s).startswith("u") for s in size.free_symbols)
