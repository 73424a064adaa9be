"""The exact answer: the same model with the same weights, computed in float64 throughout.

    model.norm: x.to(torch.float32).pow(2)...   ->   x.to(torch.float64).pow(2)...

A float64 copy alone is not exact: models ask for float32 in norms, softmax and rotary angles.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

_SHORTER = (torch.float32, torch.bfloat16, torch.float16)
_SHORTENING = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

Module = TypeVar("Module", bound=nn.Module)


class _AskedForFloat64(TorchFunctionMode):
    """Turns every request for a shorter floating dtype into one for float64."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _SHORTENING:
            return args[0].double()
        longer = {name: _longer(value) for name, value in (kwargs or {}).items()}
        return func(*map(_longer, args), **longer)


def _longer(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORTER else value


@contextmanager
def exact() -> Iterator[None]:
    """Whatever runs inside computes in float64, given float64 inputs; autocast is off."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_AskedForFloat64())
        yield


def in_float64(module: Module) -> Module:
    """A copy in float64 that shares nothing with `module` (8 bytes a parameter)."""
    copied = copy.deepcopy(module).double()
    for part in copied.modules():  # transformers' own experts: grouped_mm serves no float64
        own: Any = vars(part).get("config")
        if getattr(own, "_experts_implementation", None) == "grouped_mm":
            own._experts_implementation = "eager"
    config = getattr(copied, "config", None) if isinstance(copied, PreTrainedModel) else None
    if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        copied.set_attn_implementation("sdpa")  # type: ignore[operator]
    return copied


def to_float64(tree: Any) -> Any:
    """The tree of arguments with every floating tensor as float64."""
    return to_dtype(tree, torch.float64)


def to_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """The tree of arguments with every floating tensor in this dtype."""

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, converted, tree)
