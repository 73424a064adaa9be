"""What a trace must find on the model, and must leave as it found it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


def named_tensors(root: nn.Module) -> dict[int, str]:
    """Paths of parameters, buffers and tensors held as plain attributes, by identity."""
    named: dict[int, str] = {}
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        for group in (module._parameters, module._buffers, module.__dict__):
            for name, value in group.items():
                if isinstance(value, torch.Tensor):
                    named.setdefault(id(value), prefix + name)
    return named


@contextlib.contextmanager
def autocast_cache_off() -> Iterator[None]:
    """Autocast keeps the casts of weights for later calls: a fake one must not get among them."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


@contextlib.contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Models store tensors on themselves during forward; a fake must not stay there."""
    groups = [g for m in root.modules() for g in (m.__dict__, m._buffers)]
    before = [dict(group) for group in groups]
    try:
        yield
    finally:
        for group, old in zip(groups, before, strict=True):
            for name, value in list(group.items()):
                if value is old.get(name):
                    continue
                if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(value)):
                    if name in old:
                        group[name] = old[name]
                    else:
                        del group[name]
