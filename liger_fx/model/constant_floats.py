"""Floats that a block reads while Dynamo compiles it are constants, whatever `dynamic` says.

    torch.compile(opt, dynamic=True); self.eps in a layer   ->   1e-06, guarded; not a number s7

With dynamic=True Dynamo takes each float that it reads for a number that may change, finds only
after tracing everything that an operator wants a constant, and begins anew: a few floats at a time,
a dozen times for two layers. But what a plan reads is what it was made for.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from liger_fx.model.dynamo import output_of


class _Before(threading.local):
    """What the setting was before each of the blocks that are being followed, outermost first."""

    def __init__(self) -> None:
        self.settings: list[bool] = []


_before = _Before()


def take_floats_for_constants(context: Any) -> None:
    """Runs while Dynamo compiles, where it comes to a block's call."""
    config: Any = torch._dynamo.config
    if not _before.settings:
        output_of(context).add_cleanup_hook(_put_back)
    _before.settings.append(config.specialize_float)
    config.specialize_float = True


def take_floats_as_before(context: Any) -> None:
    """Runs while Dynamo compiles, where that call ends."""
    config: Any = torch._dynamo.config
    config.specialize_float = _before.settings.pop()


def _put_back() -> None:
    """Where what Dynamo followed ended within a block, by an exception."""
    config: Any = torch._dynamo.config
    if _before.settings:
        config.specialize_float = _before.settings[0]
        _before.settings.clear()
