"""What named modules would launch on a GPU, compiled before they do.

   with compiling_ahead(): walk_through(LigerRMSNorm(...), (hidden_states,), {}, trains=True)
->
   the kernels of such a call, and of its backward, are compiled in other threads
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from liger_fx.kernels.compile_ahead import CompileAhead, start_triton
from liger_fx.kernels.launch import INTERPRETED

# Named modules call these besides their own code.
_FOLLOWED = ("torch.nn.", "liger_fx.", "peft.")
# What those may raise for sizes that do not fit, and where only the numbers would tell.
NOT_FOLLOWED = (RuntimeError, ValueError, TypeError, IndexError)


def is_compiled_for(module: nn.Module) -> bool:
    """Whether Triton compiles kernels for this module: it is on a CUDA device."""
    return _device_of(module) is not None


def get_ready(module: nn.Module) -> None:
    """Let Triton get ready to compile for this module, if it will."""
    if (device := _device_of(module)) is not None:
        start_triton(device.index)


def _device_of(module: nn.Module) -> torch.device | None:
    if torch.version.cuda is None or INTERPRETED:
        return None
    return next((p.device for p in module.parameters() if p.is_cuda), None)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within it tensors have sizes and strides and no numbers, and nothing is computed."""
    with CompileAhead(), torch.no_grad():
        yield


def walk_through(module: nn.Module, args: Any, kwargs: Any, trains: bool) -> Any:
    """The module's result, without numbers; where it ``trains``, its backward is walked through,
    too. Raises NOT_FOLLOWED; TypeError for one that runs code of others, or whose weights are
    tensors of a kind of their own."""
    twin = _without_numbers(module)
    args, kwargs = tree_map(emptied, (args, kwargs))
    with torch.set_grad_enabled(trains):
        results = twin(*args, **kwargs)
        _differentiate([*tree_leaves((args, kwargs)), *twin.parameters()], results)
    return tree_map(emptied, results)


def _without_numbers(module: nn.Module) -> nn.Module:
    """The module, and those in it, with empty weights, and without hooks."""
    if not type(module).__module__.startswith(_FOLLOWED) or "forward" in vars(module):
        raise TypeError
    made = copy.copy(module)
    held = vars(made)
    held |= {name: value for name, value in vars(nn.Module()).items() if "hooks" in name}
    for group in ("_parameters", "_buffers"):
        held[group] = {name: _weight(tensor) for name, tensor in held[group].items()}
    children = held["_modules"].items()
    held["_modules"] = {name: child and _without_numbers(child) for name, child in children}
    return made


def _weight(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if type(tensor) not in (torch.Tensor, nn.Parameter, type(None)):
        raise TypeError
    return emptied(tensor)


def emptied(value: Any) -> Any:
    """A tensor that is laid out as this one, and has no numbers; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    layout: Any = value.shape, value.stride()
    made = torch.empty_strided(*layout, dtype=value.dtype, device=value.device)
    return trained(made, value.requires_grad)


def trained(value: Any, is_trained: bool) -> Any:
    """The value, which requires a gradient if it is a tensor of numbers that are trained."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(is_trained)
    return value


def _differentiate(given: list[Any], results: Any) -> None:
    """Walk through the backward of what can be differentiated."""
    asked = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    made = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor) and x.requires_grad]
    if asked and made:
        grads = [torch.empty_like(x) for x in made]
        # In this thread: that of the GPU may be the one that waits for this, in a checkpoint.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(made, asked, grads, allow_unused=True)
