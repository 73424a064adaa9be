"""Modules that accelerate put on devices: what its hooks do around their calls.

    dispatch_model(opt, device_map); AutoModelForCausalLM.from_pretrained(..., device_map="auto")
 ->
    a forward of its own on each module, which brings the inputs to the module's device

On modules in a block that is itself brought to that device it moves nothing, and a graph may go
through them. Taken off, a hook leaves the class's own forward on the module.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn


def moves_nothing(module: nn.Module, block: nn.Module) -> bool:
    """Whether a module's own forward is its class's, or one of accelerate that moves nothing where
    the block around it is called: the hook of that has its inputs on this device already, and the
    weights stay."""
    hook: Any = vars(module).get("_hf_hook")
    outer: Any = vars(block).get("_hf_hook")
    forward = vars(module).get("forward")
    if _is_its_class_s(forward, module):
        return True
    if not (_aligns(hook) and _aligns(outer)):
        return False
    return (
        isinstance(forward, functools.partial)
        and forward.func.__module__ == type(hook).__module__
        and _is_its_class_s(vars(module).get("_old_forward"), module)
        and not hook.offload
        and not hook.io_same_device
        and hook.execution_device is not None
        and hook.execution_device == outer.execution_device
    )


def _is_its_class_s(forward: Any, module: nn.Module) -> bool:
    is_bound = isinstance(forward, MethodType) and forward.__self__ is module
    return is_bound and forward.__func__ is type(module).forward


def _aligns(hook: Any) -> bool:
    """Told by its name: accelerate need not be there."""
    kind = type(hook)
    return kind.__name__ == "AlignDevicesHook" and kind.__module__ == "accelerate.hooks"
