"""A tiny model of each family and what optimize() makes of it, built once and shared by the tests.

    model, opt = pair("llama")                  # float32, eval mode
    model, opt = pair("llama", torch.bfloat16)

A test that changes either one (mode, weights, hooks) builds its own with `fresh`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

import liger_fx
from tests.support.families import EVERY_EXPERT, build, make_inputs


def fresh(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Any, Any]:
    """A new model and its optimised twin, first traced for ids with a mask."""
    model = build(name, dtype=dtype, **overrides)
    return model, liger_fx.optimize(model, inputs=make_inputs(model, pad=True))


@functools.cache
def pair(
    name: str, dtype: torch.dtype = torch.float32, every_expert: bool = False
) -> tuple[Any, Any]:
    """The shared model and its optimised twin; leave both in eval mode and without gradients."""
    if every_expert and name not in EVERY_EXPERT:
        return pair(name, dtype)
    return fresh(name, dtype, **(EVERY_EXPERT[name] if every_expert else {}))


@contextlib.contextmanager
def mode(train: bool, *models: torch.nn.Module) -> Iterator[None]:
    """Train or eval mode while the block runs, then eval again."""
    for model in models:
        model.train(train)
    try:
        yield
    finally:
        for model in models:
            model.eval()
