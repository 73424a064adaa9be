"""Logits that are computed when something reads their values.

    loss, logits = head(...)      shape, dtype, device and grad_fn are there, the numbers are not
    logits.argmax(-1)             now they are computed, and kept

What only walks over all fields of an output reads nothing: its metadata, ``detach`` and a change of
dtype (accelerate turns every result to float32) give lazy logits again, which are computed with
those that they came from: what is written into these afterwards is not theirs. ``clone`` reads.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import TracingContext
from torch.utils import _pytree as pytree

from liger_fx.kernels.library import differentiable, gradients_of

Head = Callable[..., torch.Tensor]
_ATEN = torch.ops.aten


def lazy_logits(head: Head, dtype: torch.dtype, *inputs: torch.Tensor | None) -> torch.Tensor:
    """``head(*inputs)``, to be computed when it is read, with its gradient for the inputs.

    inputs: h, weight and, or None, bias: the result is of that dtype and has h's shape but for the
    last size, which is the weight's first. Reading raises RuntimeError if an input was written into
    since: an optimizer's step would make other logits of the same call.
    """
    made: torch.Tensor = _Later.apply(head, dtype, *inputs)
    return made


def _again(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        grads = gradients_of(ctx.head, ctx.saved_tensors, (grad,), ctx.needs_input_grad[2:])
    return None, None, *grads


class _Later(torch.autograd.Function):
    """The node of the autograd graph that stands for the head."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, dtype: torch.dtype, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.head = head
        ctx.save_for_backward(*inputs)
        h, weight = inputs[:2]
        assert h is not None and weight is not None
        spec = torch.empty((*h.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")
        held = tuple(None if x is None else x.detach() for x in inputs)
        return LazyLogits(spec, h.device, _Reading(head, held))

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            logits = ctx.head(*inputs)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        grads = dict(zip(map(id, wanted), torch.autograd.grad(logits, wanted, grad), strict=True))
        return None, None, *(grads.get(id(x)) for x in inputs)


class _Value:
    """A value that is computed once, and before anything can write to it those that are copies."""

    def __init__(self, result: torch.Tensor | None = None) -> None:
        self.result = result
        self.copies: weakref.WeakSet[_Copy] = weakref.WeakSet()

    def value(self) -> torch.Tensor:
        if self.result is None:
            self.result = self._computed()
            for copied in list(self.copies):
                copied.value()
        return self.result

    def _computed(self) -> torch.Tensor:
        raise NotImplementedError


class _Reading(_Value):
    """What a head gives; it lets go of what it was computed from."""

    def __init__(self, head: Head, inputs: tuple[torch.Tensor | None, ...]) -> None:
        super().__init__()
        self.head: Head | None = head
        self.inputs = inputs
        self.versions = list(map(_version, inputs))

    def _computed(self) -> torch.Tensor:
        assert self.head is not None
        if list(map(_version, self.inputs)) != self.versions:
            raise RuntimeError(
                "These logits were to be computed when they are read, and the hidden states or "
                "the weight were changed since. Read them before the optimizer's step, or use "
                "optimize(model, logits='always')."
            )
        device = next(x.device.type for x in self.inputs if x is not None)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            result = self.head(*self.inputs)
        self.head, self.inputs = None, ()
        return result


def _version(x: torch.Tensor | None) -> tuple[int, int] | None:
    """Changes with what is written; FSDP frees a weight's memory without writing."""
    return None if x is None else (x._version, x.untyped_storage().nbytes())


class _Copy(_Value):
    """What a change of dtype makes of a value that nobody has read yet."""

    def __init__(self, source: _Value, func: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.source: _Value | None = source
        self.apply = lambda x: func(x, *args, **kwargs)
        source.copies.add(self)

    def value(self) -> torch.Tensor:
        if self.source is not None:
            self.source.value()  # which computes its copies
        return super().value()

    def _computed(self) -> torch.Tensor:
        assert self.source is not None
        result: torch.Tensor = self.apply(self.source.result)
        self.source = None
        return result


class LazyLogits(torch.Tensor):
    """A tensor without memory; results of operations on it are plain tensors."""

    _reading: Any
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, spec: torch.Tensor, device: torch.device, reading: Any) -> LazyLogits:
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, spec.shape, spec.stride(), dtype=spec.dtype, device=device
        )
        made._reading = reading
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and _reads_nothing(func, first, kwargs):
            spec = func(
                torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device="meta"),
                *args[1:], **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})},
            )  # fmt: skip
            shared = func is _ATEN.detach.default
            reading = first._reading if shared else _Copy(first._reading, func, args[1:], kwargs)
            return LazyLogits(spec, first.device, reading)
        args, kwargs = pytree.tree_map_only(LazyLogits, _value, (args, kwargs))
        out = func(*args, **kwargs)
        # An operation that works in place gives back what it was called on.
        return first if isinstance(first, LazyLogits) and out is args[0] else out

    @property
    def _read_values(self) -> torch.Tensor:
        return _value(self)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """What a compiled function is given is read: the values alone."""
        return ["_read_values"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: None, size: Any, stride: Any) -> LazyLogits:
        values = inner["_read_values"]
        spec = torch.empty_strided(size, stride, dtype=values.dtype, device="meta")
        return LazyLogits(spec, values.device, _Value(values))

    def _plain(self) -> torch.Tensor:
        """A view of it with memory, in the same autograd graph."""
        view: torch.Tensor = _ATEN.alias.default(self)
        return view

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self._plain())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain().__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain().__dlpack__(*args, **kwargs)

    def numpy(self, **kwargs: Any) -> Any:
        """The values as an array."""
        return self._plain().numpy(**kwargs)

    def tolist(self) -> Any:
        """The values as lists."""
        return self._plain().tolist()

    def data_ptr(self) -> int:
        """Where the values lie."""
        return self._plain().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values; while a function is compiled that is given them, and where they
        are followed into it (``__tensor_flatten__``), none."""
        if TracingContext.try_get() is not None:
            return super().untyped_storage()
        return self._plain().untyped_storage()


def _value(x: LazyLogits) -> torch.Tensor:
    value: torch.Tensor = x._reading.value()
    return value


def _reads_nothing(func: Any, x: LazyLogits, kwargs: dict[str, Any]) -> bool:
    if func is _ATEN.detach.default:
        return True
    if func is not _ATEN._to_copy.default or x._reading.result is not None:
        return False
    there = kwargs.get("device")
    return there is None or torch.device(there) == x.device
