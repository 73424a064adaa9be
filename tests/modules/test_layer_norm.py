"""LigerLayerNorm and LigerAddLayerNorm stand in for PyTorch's own and the models' own norms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.modules import LigerAddLayerNorm, LigerLayerNorm
from liger_fx.modules.casting import _WIDENED, Cast

T = torch.Tensor
torch.manual_seed(0)
WEIGHT, BIAS = torch.randn(2, 16)


def pytorch(x: T, weight: T, bias: T) -> T:
    return F.layer_norm(x, (16,), weight, bias, 1e-5)


def cohere(x: T, weight: T, bias: T) -> T:
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    wide = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (weight.float() * wide + bias.float()).to(x.dtype)


def promoting(x: T, weight: T, bias: T) -> T:
    return weight * F.layer_norm(x.float(), (16,)).to(x.dtype) + bias


SPELLINGS: dict[Cast, Callable[[T, T, T], T]] = {
    "autocast": pytorch, "input": cohere, "promote": promoting
}  # fmt: skip


def module(
    cast: Cast = "input", dtype: torch.dtype = torch.float32, offset: float = 0.0
) -> nn.Module:
    weight, bias = (nn.Parameter(t.to(dtype)) for t in (WEIGHT, BIAS))
    return LigerLayerNorm(16, 1e-5, weight=weight, bias=bias, cast=cast, offset=offset)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", SPELLINGS)
def test_dtype_and_value(cast: Cast, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    if cast == "autocast" and w_dtype.itemsize < x_dtype.itemsize:
        pytest.skip("PyTorch refuses it")
    x, weight, bias = torch.randn(3, 5, 16).to(x_dtype), WEIGHT.to(w_dtype), BIAS.to(w_dtype)
    found, eager = module(cast, w_dtype)(x), SPELLINGS[cast](x, weight, bias)
    exact = F.layer_norm(x.double(), (16,), weight.double(), bias.double(), 1e-5)
    assert found.dtype == eager.dtype
    error, limit = (found.double() - exact).norm(), (eager.double() - exact).norm()
    assert error <= 1.1 * limit + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_under_autocast_the_dtype_is_that_of_pytorchs_own(dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert module("autocast", dtype)(x).dtype == nn.LayerNorm(16, dtype=dtype)(x).dtype
        assert module("input", dtype)(x).dtype == dtype


def test_on_which_devices_autocast_widens_is_asked_of_pytorch() -> None:
    assert "cuda" in _WIDENED and "cpu" not in _WIDENED


def test_holds_the_original_parameters_under_their_names() -> None:
    weight, bias = nn.Parameter(WEIGHT.clone()), nn.Parameter(BIAS.clone())
    named = LigerLayerNorm(16, 1e-5, weight=weight, weight_name="g", bias=bias, bias_name="b")
    assert dict(named.named_parameters()) == {"g": weight, "b": bias}
    named(torch.randn(2, 16)).sum().backward()
    assert weight.grad is not None and weight.grad.any()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((16,), 2.0))


def test_factors_of_the_call() -> None:
    x, bare = torch.randn(3, 16), LigerLayerNorm(16, 1e-5)
    assert list(bare.state_dict()) == []
    torch.testing.assert_close(bare(x), F.layer_norm(x, (16,)))
    torch.testing.assert_close(bare(x, WEIGHT), F.layer_norm(x, (16,), WEIGHT))
    torch.testing.assert_close(bare(x, WEIGHT, BIAS), pytorch(x, WEIGHT, BIAS))
    torch.testing.assert_close(module()(x, BIAS, WEIGHT), pytorch(x, BIAS, WEIGHT))


def test_of_a_sum_it_gives_the_sum_too() -> None:
    a, b = torch.randn(2, 3, 16)
    named = LigerAddLayerNorm(16, 1e-5, weight=nn.Parameter(WEIGHT), bias=nn.Parameter(BIAS))
    y, s = named(a, b)
    assert torch.equal(s, a + b)
    torch.testing.assert_close(y, pytorch(a + b, WEIGHT, BIAS))
    torch.testing.assert_close(named(a), pytorch(a, WEIGHT, BIAS))
    torch.testing.assert_close(
        LigerAddLayerNorm(16, 1e-5)(a, b, WEIGHT, BIAS)[0], pytorch(a + b, WEIGHT, BIAS)
    )


def test_copies_and_moves_like_a_module() -> None:
    named, x = module(offset=1.0), torch.randn(3, 16)
    for other in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert type(other) is LigerLayerNorm and other.weight is not named.weight
        assert torch.equal(other(x), named(x))
    zero, one = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))
    other = LigerLayerNorm(16, 1e-5, offset=1.0, weight=zero, bias=one)
    other.load_state_dict(named.state_dict())
    assert torch.equal(other(x), named(x))
    assert copy.deepcopy(named).to(torch.float64)(x.double()).dtype == torch.float64
    assert copy.deepcopy(named).to("meta")(x.to("meta")).shape == x.shape


def test_repr() -> None:
    weight, bias = nn.Parameter(WEIGHT), nn.Parameter(BIAS)
    assert repr(LigerLayerNorm(16, 1e-5)) == "LigerLayerNorm((16,), eps=1e-05)"
    assert repr(LigerLayerNorm(16, 1e-6, weight=weight, offset=1.0, cast="promote")) == (
        "LigerLayerNorm((16,), eps=1e-06, 1 + weight, cast=promote)"
    )
    assert repr(LigerAddLayerNorm(16, 1e-5, weight=weight, bias=bias, cast="autocast")) == (
        "LigerAddLayerNorm((16,), eps=1e-05, weight, bias, cast=autocast)"
    )


def test_unknown_cast_is_refused() -> None:
    with pytest.raises(ValueError, match="cast must be one of input, promote, autocast, not 'fl"):
        LigerLayerNorm(16, 1e-5, cast="float")  # type: ignore[arg-type]


def test_compiled_it_is_one_graph() -> None:
    named, x = module("autocast"), torch.randn(3, 16)
    compiled = torch.compile(named, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), named(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), named(x))
