"""What one call of a model gives: its outputs, and the gradient of every parameter.

run(model, parameters, call)   ->   Run(outputs: loss, logits; gradients: lm_head.weight, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """Detached tensors by name; a gradient that does not exist (no path) is absent."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    @classmethod
    def of(cls, outputs: Tensors, wanted: Tensors) -> Run:
        """The outputs, and the gradient of their scalar with respect to each wanted tensor."""
        scalar = outputs["loss"] if "loss" in outputs else _project(outputs)
        found = _gradients(scalar, {n: t for n, t in wanted.items() if t.requires_grad})
        return cls({name: tensor.detach() for name, tensor in outputs.items()}, found)


def run(
    model: nn.Module, parameters: Tensors, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Run:
    """One forward and backward of `model(*args, **kwargs)`.

    The gradient is the loss's where the model gives one, else that of the outputs' product with
    fixed random numbers. No .grad is touched.
    """
    return Run.of(floating(model(*args, **kwargs)), parameters)


def floating(result: Any) -> dict[str, torch.Tensor]:
    """The floating tensors of a result by name ("logits", "hidden_states.0"); no caches."""
    items = result.items() if isinstance(result, Mapping) else [("output", result)]
    found: dict[str, torch.Tensor] = {}
    for name, value in items:
        leaves = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        for place, tensor in enumerate(leaves):
            if tensor.is_floating_point():
                found[f"{name}.{place}" if len(leaves) > 1 else name] = tensor
    return found


def _project(outputs: Tensors) -> torch.Tensor:
    """A scalar whose gradient with respect to each output is fixed noise, equal in every dtype."""
    generator = torch.Generator().manual_seed(0)
    total: Any = 0.0
    for tensor in outputs.values():
        # bfloat16 holds these values exactly, so no dtype rounds them
        noise = torch.randint(-8, 9, tensor.shape, generator=generator) / 8
        if tensor.requires_grad:
            total = total + (tensor * noise.to(tensor)).sum(dtype=torch.float64)
    return total


def _gradients(scalar: torch.Tensor, wanted: Tensors) -> dict[str, torch.Tensor]:
    if not wanted or not isinstance(scalar, torch.Tensor) or not scalar.requires_grad:
        return {}
    found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}
