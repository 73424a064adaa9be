"""Runs hand-written modules as accuracy.py runs models: outputs and every gradient."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from tests.support.accuracy import InFloat64, Judge, Run

Inputs = tuple[torch.Tensor, ...]


def run(module: nn.Module, inputs: Inputs, *, float64: bool = False) -> Run:
    """Outputs, and gradients of parameters and floating inputs for a fixed upstream gradient."""
    module.zero_grad(set_to_none=True)
    given = [_leaf(x, float64) for x in inputs]
    with InFloat64() if float64 else nullcontext():
        result = module(*given)
        results = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(results, _upstream(results))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    outputs = {f"output {i}": r.detach().double() for i, r in enumerate(results)}
    return Run(outputs, {name: grad.double() for name, grad in gradients.items()})


def _leaf(x: torch.Tensor, float64: bool) -> torch.Tensor:
    x = x.detach().double() if float64 and x.is_floating_point() else x.detach().clone()
    return x.requires_grad_(x.is_floating_point())


def _upstream(results: Inputs) -> list[torch.Tensor]:
    """Random quarters, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(1)
    shapes = [r.shape for r in results]
    quarters = [torch.randint(-8, 9, shape, generator=generator) / 4 for shape in shapes]
    return [q.to(r.dtype) for q, r in zip(quarters, results, strict=True)]


def judge(module: nn.Module, opt: nn.Module, calls: list[Inputs]) -> Judge:
    """Promise 6 for a module over several calls taken together."""
    exact: Any = copy.deepcopy(module).double()
    verdict = Judge()
    for inputs in calls:
        verdict.add(run(exact, inputs, float64=True), run(module, inputs), run(opt, inputs))
    return verdict
