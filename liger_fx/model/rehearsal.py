"""A real call of a model whose effects do not stay.

    with rehearsed(root): root(input_ids)   ->   graphs for the blocks inside; nothing else is new

A model that no graph can serve is run once, so that the blocks inside it meet a call.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.root_state import attributes_kept
from liger_fx.tracing.walk import modules_by_path


@contextmanager
def rehearsed(root: nn.Module) -> Iterator[None]:
    """Within it, what ``root`` and its own modules write to themselves, to their weights and to any
    buffer, and what is drawn of Python's, numpy's, PyTorch's and their own random numbers, is put
    back afterwards. (The weights of blocks inside, which graphs serve, are not looked after: a copy
    of them all would double the memory.)"""
    own = [module for module in _own_modules(root) if module is root or not is_block(module)]
    tensors: list[torch.Tensor] = [p for module in own for p in module.parameters(recurse=False)]
    tensors += root.buffers()
    generators = [
        value
        for module in own
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    kept = [tensor.detach().cpu().clone() for tensor in tensors]
    drawn = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    try:
        with attributes_kept(root, own), torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)
        for tensor, was in zip(tensors, kept, strict=True):
            then = was.to(tensor.device)
            if not torch.equal(tensor.detach(), then):
                tensor.data.copy_(then)


def _own_modules(root: nn.Module) -> Iterable[nn.Module]:
    """Those of no block inside, and these blocks."""
    return modules_by_path(root, entered=lambda m: m is root or not is_block(m)).values()
