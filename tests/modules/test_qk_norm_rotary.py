"""The module of a norm and a turn: its layouts, its options, and what it says of itself."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch

from liger_fx.modules import (
    LigerNormRotaryEmbedding,
    LigerQKNormRotaryEmbedding,
    LigerRMSNorm,
    LigerRotaryEmbedding,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("exchanged, heads_dim", list(product((False, True), (1, 2))))
@pytest.mark.parametrize("cast, norm_cast", list(product(("input", "promote"), repeat=2)))
@pytest.mark.parametrize("weights, tables", list(product(DTYPES, repeat=2)), ids=str)
def test_it_is_two_norms_and_a_turn(
    exchanged: bool, heads_dim: int, cast: Any, norm_cast: Any, weights: Any, tables: Any
) -> None:
    torch.manual_seed(0)
    heads_last = exchanged != (heads_dim == 2)
    q, k = (torch.randn((2, 5, n, 8) if heads_last else (2, n, 5, 8)).bfloat16() for n in (3, 1))
    a, b = torch.randn(2, 8).to(weights)
    cos, sin = torch.randn(2, 1, 5, 6).to(tables)
    norm = LigerRMSNorm(8, 1e-5, offset=1.0, cast=norm_cast)
    turn = LigerRotaryEmbedding(cast=cast, heads_dim=heads_dim)
    wanted = norm(q, a), norm(k, b)
    if exchanged:
        wanted = wanted[0].transpose(1, 2), wanted[1].transpose(1, 2)
    wanted = turn(*wanted, cos, sin)
    options: dict[str, Any] = {"eps": 1e-5, "offset": 1.0, "norm_cast": norm_cast, "cast": cast}
    options |= {"exchanged": exchanged, "heads_dim": heads_dim}
    found = LigerQKNormRotaryEmbedding(**options)(q, k, a, b, cos, sin)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    alone = LigerNormRotaryEmbedding(**options)(q, a, cos, sin)
    assert torch.equal(alone, found[0])


def test_without_eps_it_is_that_of_the_dtype_of_the_norm() -> None:
    x, w, (cos, sin) = torch.randn(1, 2, 3, 8) * 1e-4, torch.ones(8), torch.randn(2, 1, 3, 8)
    for dtype in (torch.float32, torch.float64):
        given = [t.to(dtype) for t in (x, w, cos, sin)]
        wanted, found = (
            LigerNormRotaryEmbedding(eps=eps)(*given) for eps in (torch.finfo(dtype).eps, None)
        )
        assert torch.equal(found, wanted)


def test_copies_like_a_module() -> None:
    module = LigerQKNormRotaryEmbedding(eps=1e-6, offset=1.0, exchanged=True)
    inputs = (*torch.randn(2, 1, 5, 2, 8), *torch.randn(2, 8), *torch.randn(2, 1, 5, 8))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)).to(torch.float64)):
        assert all(map(torch.equal, other(*inputs), module(*inputs)))


def test_repr() -> None:
    module = LigerQKNormRotaryEmbedding(
        eps=1e-6, offset=1.0, norm_cast="promote", exchanged=True, rotary_dim=4, head_dim=8
    )
    assert module.extra_repr() == (
        "eps=1e-06, scale=1 + weight, norm_cast=promote, exchanged=True, 4 of 8, half-split"
    )


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="cast must be one of"):
        LigerNormRotaryEmbedding(eps=1e-6, norm_cast="float")  # type: ignore[arg-type]
