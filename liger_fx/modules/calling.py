"""A call of a module in fewer steps of Python, where PyTorch's own would only call forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

_MODULE_CALL, _LINEAR_FORWARD = nn.Module.__call__, nn.Linear.forward


def caller() -> Callable[..., Any]:
    """What a module calls its children by: `call`; where Dynamo follows it, or a profiler takes the
    modules' names from it, a plain call."""
    plainly = torch.compiler.is_dynamo_compiling() or torch.autograd._profiler_enabled()
    return _plain_call if plainly else call


def _plain_call(module: Any, x: Any) -> Any:
    return module(x)


def call(module: Any, x: Any) -> Any:
    """What ``module(x)`` gives, its hooks included; of a plain linear layer, by its operator.

    Where Dynamo follows the call, or under a profiler, that of `caller` is wanted.
    """
    if not only_runs_forward(module):
        return module(x)
    if (kind := type(module)) is nn.Linear and kind.forward is _LINEAR_FORWARD:
        parameters = module._parameters
        weight = parameters.get("weight")
        if weight is not None and "bias" in parameters:
            return F.linear(x, weight, parameters["bias"])
    return module.forward(x)


def call_with(module: Any, *args: Any, **kwargs: Any) -> Any:
    """`call`, with other arguments than one."""
    if only_runs_forward(module):
        return module.forward(*args, **kwargs)
    return module(*args, **kwargs)


def only_runs_forward(module: Any) -> bool:
    """Whether a call of the module is its class's forward and no more: no hook stands on it, or on
    all modules."""
    held = module.__dict__
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        or held.get("_compiled_call_impl") is not None
        or type(module).__call__ is not _MODULE_CALL
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )
