"""Hand-written modules, none from transformers: every spelling is found, and computes the same.

optimize(module, inputs=(x,))  ->  a GraphModule with the named module in place
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn

import liger_fx
from tests.models import mlps, norms, rotaries
from tests.support.accuracy import furthest
from tests.support.modules import Inputs, judge, run

WIDTH = 24
SHAPES = ((2, 5), (1, 1), (3, 8))
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = 2e-6


def rows(dtype: torch.dtype, batch: int, length: int) -> Inputs:
    torch.manual_seed(batch)
    return (torch.randn(batch, length, WIDTH).to(dtype),)


def heads(kind: type[rotaries.HeadsFirst], dtype: torch.dtype, batch: int, length: int) -> Inputs:
    torch.manual_seed(batch)
    head_dim = 16
    q, k = torch.randn(batch, 4, length, head_dim), torch.randn(batch, 2, length, head_dim)
    if kind.layout == 2:
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    turned = int(head_dim * kind.share)
    cos, sin = rotaries.angles(length, turned, dtype, kind.interleaved)
    return q.to(dtype), k.to(dtype), cos, sin


def optimized(module: nn.Module, inputs: Inputs) -> Any:
    opt = liger_fx.optimize(module, inputs=inputs)
    assert isinstance(opt, fx.GraphModule)
    return opt


def same(module: nn.Module, opt: nn.Module, calls: list[Inputs]) -> None:
    """Float32 to rounding in every call; a shorter dtype by promise 6 over all of them."""
    if calls[0][0].dtype is torch.float32:
        for inputs in calls:
            assert furthest(run(opt, inputs), run(module, inputs)) < ROUNDING
    assert judge(module, opt, calls).faults() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", norms.SPELLINGS, ids=lambda kind: kind.__name__)
def test_norms(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = kind(WIDTH).to(dtype)
    calls = [rows(dtype, *shape) for shape in SHAPES]
    opt = optimized(module, calls[0])
    assert Counter(s.rule for s in opt.report.rewritten) == {"rms_norm": norms.SPELLINGS[kind]}
    assert {s.after_class for s in opt.report.rewritten} == {"LigerRMSNorm"}
    assert opt.state_dict().keys() == module.state_dict().keys()
    same(module, opt, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", mlps.SPELLINGS, ids=lambda kind: kind.__name__)
def test_mlps(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = kind(WIDTH).to(dtype)
    calls = [rows(dtype, *shape) for shape in SHAPES]
    opt = optimized(module, calls[0])
    rule, class_name = mlps.SPELLINGS[kind]
    assert [(s.rule, s.after_class) for s in opt.report.rewritten] == [(rule, class_name)]
    assert opt.state_dict().keys() == module.state_dict().keys()
    same(module, opt, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", rotaries.SPELLINGS, ids=lambda kind: kind.__name__)
def test_rotaries(kind: type[rotaries.HeadsFirst], dtype: torch.dtype) -> None:
    module = kind()
    calls = [heads(kind, dtype, *shape) for shape in SHAPES]
    opt = optimized(module, calls[0])
    assert [s.rule for s in opt.report.rewritten] == ["rotary"]
    same(module, opt, calls)


@pytest.mark.parametrize("kind", norms.NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_of_the_norm(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    near_miss(kind(WIDTH), [rows(torch.float32, *shape) for shape in SHAPES], "rms_norm")


@pytest.mark.parametrize("kind", rotaries.NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_of_the_rotary_embedding(kind: type[rotaries.HeadsFirst]) -> None:
    near_miss(kind(), [heads(kind, torch.float32, *shape) for shape in SHAPES], "rotary")


@pytest.mark.parametrize("kind", mlps.NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_of_the_mlp(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    near_miss(kind(WIDTH), [rows(torch.float32, *shape) for shape in SHAPES], "gated_mlp")


def near_miss(module: nn.Module, calls: list[Inputs], rule: str) -> None:
    """Not taken for what it resembles, and computing as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", liger_fx.NothingRewrittenWarning)
        opt = liger_fx.optimize(module, inputs=calls[0])
    assert rule not in {site.rule for site in opt.report.rewritten}
    for inputs in calls:
        assert furthest(run(opt, inputs), run(module, inputs)) < ROUNDING


def test_a_whole_block_by_hand() -> None:
    """Norms, rotary and MLP of unlike spellings in one module: one site of each."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norms.PowMinusHalf(WIDTH)
            self.q = nn.Linear(WIDTH, WIDTH)
            self.k = nn.Linear(WIDTH, WIDTH)
            self.rotary = rotaries.HeadsLast()
            self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6)
            self.mlp = mlps.PackedUpFirst(WIDTH)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            h = self.norm(x)
            q, k = (proj(h).view(batch, length, 3, 8) for proj in (self.q, self.k))
            q, k = self.rotary(q, k, cos, sin)
            h = x + (q + k).reshape(batch, length, width)
            return h + self.mlp(self.mlp_norm(h))

    torch.manual_seed(0)
    module = Block()
    calls = []
    for batch, length in SHAPES:
        cos, sin = rotaries.angles(length, 8, torch.float32)
        calls.append((*rows(torch.float32, batch, length), cos, sin))
    opt = optimized(module, calls[0])
    found = Counter(site.rule for site in opt.report.rewritten)
    assert found == {"rms_norm": 2, "rotary": 1, "gated_mlp": 1}
    same(module, opt, calls)
