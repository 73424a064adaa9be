"""A real call of a model whose effects do not stay.

    with rehearsed(root): root(input_ids)   ->   graphs for the blocks inside; nothing else is new

A model that no graph can serve is run once, so that the blocks inside it meet a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from liger_fx.tracing.inner_blocks import is_block
from liger_fx.tracing.root_state import attributes_kept
from liger_fx.tracing.streams import streams_kept
from liger_fx.tracing.walk import modules_by_path


@contextmanager
def rehearsed(root: nn.Module) -> Iterator[None]:
    """Within it, what ``root`` and its own modules write to themselves, to their weights and to any
    buffer, and what is drawn of Python's, numpy's, PyTorch's and their own random numbers, is put
    back afterwards. (The weights of blocks inside, which graphs serve, are not looked after: a copy
    of them all would double the memory.)"""
    own = _own_modules(root)
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
    try:
        # GPUs have streams of their own, which fork_rng keeps.
        with attributes_kept(root, own), streams_kept(), torch.random.fork_rng():
            yield
    finally:
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)
        for tensor, was in zip(tensors, kept, strict=True):
            then = was.to(tensor.device)
            if not torch.equal(tensor.detach(), then):
                tensor.data.copy_(then)


def _own_modules(root: nn.Module) -> list[nn.Module]:
    """The root and what it holds, but for blocks inside and what these hold."""

    def is_own(module: nn.Module) -> bool:
        return module is root or not is_block(module)

    return list(filter(is_own, modules_by_path(root, entered=is_own).values()))
