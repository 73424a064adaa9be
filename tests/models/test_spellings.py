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
from tests.models.hosts import HEAD, WIDTH, Around, Attention
from tests.support.accuracy import furthest
from tests.support.modules import Inputs, judge, run

# Several of one kind: promise 6 is judged over all calls, and few rows round by luck.
SHAPES = ((2, 5), (1, 1), *((3, length) for length in range(8, 16)))
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = 2e-6


def rows(dtype: torch.dtype, batch: int, length: int) -> Inputs:
    torch.manual_seed(100 * batch + length)
    return (torch.randn(batch, length, 10).to(dtype),)


def around(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Around(kind(WIDTH)).to(dtype)


def attention(kind: type[rotaries.HeadsFirst], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Attention(kind(), heads_first=kind.layout == 1).to(dtype)


def turns(kind: type[rotaries.HeadsFirst], dtype: torch.dtype, batch: int, length: int) -> Inputs:
    """Rows and the angles of their positions."""
    cos, sin = rotaries.angles(length, int(HEAD * kind.share), dtype, kind.interleaved)
    return (*rows(dtype, batch, length), cos, sin)


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
    module = around(kind, dtype)
    calls = [rows(dtype, *shape) for shape in SHAPES]
    opt = optimized(module, calls[0])
    sums = 1 if kind is norms.Inline else 0  # the second of its norms is that of a sum
    found = Counter(site.after_class for site in opt.report.rewritten)
    assert found.pop("LigerAddRMSNorm", 0) == sums
    assert found == {"LigerRMSNorm": norms.SPELLINGS[kind] - sums}
    assert opt.state_dict().keys() == module.state_dict().keys()
    same(module, opt, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", mlps.SPELLINGS, ids=lambda kind: kind.__name__)
def test_mlps(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = around(kind, dtype)
    calls = [rows(dtype, *shape) for shape in SHAPES]
    opt = optimized(module, calls[0])
    rule, class_name = mlps.SPELLINGS[kind]
    assert [(s.rule, s.after_class) for s in opt.report.rewritten] == [(rule, class_name)]
    assert opt.state_dict().keys() == module.state_dict().keys()
    same(module, opt, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", rotaries.SPELLINGS, ids=lambda kind: kind.__name__)
def test_rotaries(kind: type[rotaries.HeadsFirst], dtype: torch.dtype) -> None:
    module = attention(kind, dtype)
    calls = [turns(kind, dtype, *shape) for shape in SHAPES]
    opt = optimized(module, calls[0])
    assert [s.rule for s in opt.report.rewritten] == ["rotary_embedding"]
    same(module, opt, calls)


@pytest.mark.parametrize("kind", norms.NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_of_the_norm(kind: type[nn.Module]) -> None:
    calls = [rows(torch.float32, *shape) for shape in SHAPES]
    near_miss(around(kind, torch.float32), calls, "rms_norm")


@pytest.mark.parametrize("kind", rotaries.NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_of_the_rotary_embedding(kind: type[rotaries.HeadsFirst]) -> None:
    calls = [turns(kind, torch.float32, *shape) for shape in SHAPES]
    near_miss(attention(kind, torch.float32), calls, "rotary_embedding")


@pytest.mark.parametrize("kind", mlps.NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_of_the_mlp(kind: type[nn.Module]) -> None:
    calls = [rows(torch.float32, *shape) for shape in SHAPES]
    near_miss(around(kind, torch.float32), calls, "gated_mlp")


def near_miss(module: nn.Module, calls: list[Inputs], rule: str) -> None:
    """Not taken for what it resembles, and computing as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", liger_fx.NothingRewrittenWarning)
        opt = liger_fx.optimize(module, inputs=calls[0])
    assert rule not in {site.rule for site in opt.report.rewritten}
    for inputs in calls:
        assert furthest(run(opt, inputs), run(module, inputs)) < ROUNDING


def test_a_norm_that_is_the_whole_model() -> None:
    """No module below the root to take the place of: the norm becomes a child of the root."""
    torch.manual_seed(0)
    module = norms.SquareRsqrt(WIDTH)
    calls: list[Inputs] = [(torch.randn(batch, length, WIDTH),) for batch, length in SHAPES]
    opt = optimized(module, calls[0])
    assert [(s.rule, s.path) for s in opt.report.rewritten] == [("rms_norm", "")]
    assert list(opt.state_dict()) == ["scale"]
    same(module, opt, calls)


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
    calls: list[Inputs] = []
    for batch, length in SHAPES:
        cos, sin = rotaries.angles(length, 8, torch.float32)
        calls.append((torch.randn(batch, length, WIDTH), cos, sin))
    opt = optimized(module, calls[0])
    found = Counter(site.rule for site in opt.report.rewritten)
    assert found == {"rms_norm": 1, "add_rms_norm": 1, "rotary_embedding": 1, "gated_mlp": 1}
    same(module, opt, calls)
