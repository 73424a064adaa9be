"""An optimised model beside its original, call by call: outputs, gradients, and whether it was
said that the original's code runs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import liger_fx
from liger_fx.errors import FallbackWarning, LigerFxError

RIGHT, TOLD = "right", "told"


class Small(nn.Module):
    """A linear layer and a norm of width 8 around a forward that is given, and further modules."""

    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)
        for name, module in modules.items():
            setattr(self, name, module)
        # The signature is the function's: a block is called as that says.
        self.__class__ = type(
            "Small", (Small,), {"forward": forward, "__init__": nn.Module.__init__}
        )


def beside(
    model: nn.Module,
    first: Any,
    calls: Iterable[Any] | None = None,
    *,
    change: Callable[[Any], Any] | None = None,
    grad: bool = True,
) -> str:
    """RIGHT where each call gives what the original gives, TOLD where that took a FallbackWarning
    or where optimize refused the model. AssertionError where results or gradients differ.

    first: the example inputs; calls: those of the calls, ``first`` by default; tuples of positional
    or dicts of named arguments. change: what is done to both models before each call.
    """
    torch.manual_seed(0)
    original = copy.deepcopy(model)
    try:
        opt = liger_fx.optimize(model, first)
    except LigerFxError:
        return TOLD
    told = False
    for call in [first] if calls is None else calls:
        if change is not None:
            change(original), change(opt)
        expected = _run(original, call, grad)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = _run(opt, call, grad)
        told |= any(issubclass(w.category, FallbackWarning) for w in caught)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            is_rounded = torch.is_tensor(theirs) and (
                theirs.is_floating_point() or theirs.is_complex()
            )
            bound = 1e-5 if is_rounded else 0
            torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)
    return TOLD if told else RIGHT


def _run(model: nn.Module, call: Any, grad: bool) -> list[Any]:
    """The values that the model returns, and the gradients of their sum."""
    model.zero_grad()
    torch.manual_seed(1)
    args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
    leaves = pytree.tree_leaves(
        dict(out) if isinstance(out := model(*args, **kwargs), dict) else out
    )
    if grad:
        tensors = [v for v in leaves if isinstance(v, torch.Tensor) and v.requires_grad]
        torch.stack([t.sum() for t in tensors]).sum().backward()  # type: ignore[no-untyped-call]
        leaves += [p.grad for p in model.parameters() if p.grad is not None]
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in leaves]
