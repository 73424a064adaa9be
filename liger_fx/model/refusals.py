"""Calls that no graph could serve: remembered, so that a training loop does not try at every step.

gradient checkpointing is on   ->  the trace fails once, later steps run the original at once
it is turned off again         ->  other circumstances: the call is traced
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from liger_fx.tracing.call import PLAIN

_MOST = 512  # calls of ever new sizes must not fill the memory


class Refusals:
    """Reasons by call and circumstances. A stale one costs speed, never correctness."""

    def __init__(self) -> None:
        self._reasons: dict[Hashable, str] = {}

    def reason(self, root: nn.Module, arguments: Mapping[str, Any]) -> str | None:
        """Why such a call was refused before, or None."""
        if not self._reasons:
            return None
        return self._reasons.get(_circumstances(root, arguments))

    def remember(self, root: nn.Module, arguments: Mapping[str, Any], reason: str) -> None:
        """Note the reason for calls like this one, while nothing changes that could lift it."""
        if len(self._reasons) >= _MOST:
            self._reasons.clear()
        self._reasons[_circumstances(root, arguments)] = reason


def _circumstances(root: nn.Module, arguments: Mapping[str, Any]) -> Hashable:
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in root.modules())
    modes = (root.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    cuda = torch.is_autocast_enabled("cuda")
    given = tuple(sorted((name, _kind(value)) for name, value in arguments.items()))
    return given, modes, cuda, checkpointing, RemovableHandle.next_id


def _kind(value: Any) -> str:
    """Of a tensor, no value: to read one waits for the device."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.device}"
    name = type(value).__name__
    if isinstance(value, dict):
        return f"{name} {[(repr(key), _kind(item)) for key, item in value.items()]}"
    if isinstance(value, (tuple, list)):
        return f"{name} {list(map(_kind, value))}"
    return f"{name} {value!r}"[:200] if isinstance(value, PLAIN) else name
