"""The arguments of ``liger_fx.load``: what they may be, and the devices that they name.

dtype=torch.int32, model=3    ->  UsageError, before any file is read
device="cuda"                 ->  cuda:0, or LoadError where there is none
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from liger_fx.errors import LoadError, UsageError, one_line

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(path: Any, model: Any, checkpoint: Any, device: Any, dtype: Any) -> None:
    """UsageError for arguments of another kind than ``load`` takes, or that exclude each other."""
    for given in (path, checkpoint or path):
        if not isinstance(given, str | PathLike):
            raise UsageError(f"load takes a directory, not a {type(given).__name__}.")
    if model is not None and (checkpoint, device, dtype) != (None, None, None):
        raise UsageError("load(model=...) takes the weights as they are: give no other argument.")
    if isinstance(model, fx.GraphModule):
        raise UsageError("load(model=...) takes the model itself, not an optimised one.")
    if model is not None and not isinstance(model, nn.Module):
        raise UsageError(f"load(model=...) takes a model, not a {type(model).__name__}.")
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise UsageError(f"load(dtype=...) takes one of {names}, not {dtype!r}.")
    if device is not None and not isinstance(device, str | torch.device):
        raise UsageError(f"load(device=...) takes a device or its name, not {device!r}.")


def usable(device: torch.device | str | None) -> torch.device | None:
    """The device by its full name, cuda:0 for cuda; LoadError if it is not there."""
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise LoadError(
            f"{device} cannot be used ({one_line(error)}): say where to load, as device='cpu'",
            "device",
        ) from None


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's parameters are, None if it has none; UsageError for several devices."""
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UsageError(f"The model is on several devices: {', '.join(map(str, devices))}.")
    return devices.pop() if devices else None
