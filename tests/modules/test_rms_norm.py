"""LigerRMSNorm stands in for each of the models' own norms."""

import copy
import pickle

import pytest
import torch
from torch import nn

from liger_fx.modules import LigerRMSNorm

torch.manual_seed(0)
WEIGHT = torch.randn(16)


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [llama, gemma])
def test_dtype_and_value(spelling, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 16).to(x_dtype), WEIGHT.to(w_dtype)
    module = LigerRMSNorm(
        16,
        1e-5,
        weight=nn.Parameter(weight),
        offset=1.0 if spelling is gemma else 0.0,
        cast="promote" if spelling is llama else "input",
    )
    eager, exact = spelling(x, weight), spelling(x.double(), weight.double())
    found = module(x)
    assert found.dtype == eager.dtype
    error, limit = (found.double() - exact).norm(), (eager.double() - exact).norm()
    assert error <= 1.1 * limit + 1e-6 * exact.norm()


def test_eps_of_the_dtype_as_torch_has_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = 1e-3 * torch.randn(4, 16, dtype=dtype)
        torch.testing.assert_close(LigerRMSNorm(16, None)(x), nn.RMSNorm(16, dtype=dtype)(x))


def test_holds_the_original_parameter_under_its_name() -> None:
    parameter = nn.Parameter(WEIGHT.clone())
    module = LigerRMSNorm(16, 1e-5, weight=parameter, weight_name="scale")
    assert dict(module.named_parameters()) == {"scale": parameter}
    assert module.scale is parameter
    module(torch.randn(2, 16)).sum().backward()
    assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_weight_of_the_call() -> None:
    x, module = torch.randn(3, 16), LigerRMSNorm(16, 1e-5)
    assert list(module.state_dict()) == []
    torch.testing.assert_close(module(x, WEIGHT), llama(x, WEIGHT))
    torch.testing.assert_close(module(x), llama(x, torch.ones(16)))
    given = LigerRMSNorm(16, 1e-5, weight=nn.Parameter(torch.zeros(16)))
    torch.testing.assert_close(given(x, WEIGHT), llama(x, WEIGHT))


def test_copies_and_moves_like_a_module() -> None:
    module = LigerRMSNorm(16, 1e-5, weight=nn.Parameter(WEIGHT.clone()), weight_name="scale")
    x = torch.randn(3, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is LigerRMSNorm
        assert other.scale is not module.scale
        assert torch.equal(other(x), module(x))
    other = LigerRMSNorm(16, 1e-5, weight=nn.Parameter(torch.zeros(16)), weight_name="scale")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert copy.deepcopy(module).to(torch.float64)(x.double()).dtype == torch.float64
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == x.shape


def test_repr() -> None:
    parameter = nn.Parameter(WEIGHT)
    assert repr(LigerRMSNorm(16, 1e-5, weight=parameter)) == "LigerRMSNorm((16,), eps=1e-05)"
    assert repr(LigerRMSNorm(16, 1e-6, weight=parameter, offset=1.0, cast="promote")) == (
        "LigerRMSNorm((16,), eps=1e-06, scale=1 + weight, cast=promote)"
    )
    assert repr(LigerRMSNorm(16, None)) == "LigerRMSNorm((16,), eps=None)"


def test_unknown_cast_is_refused() -> None:
    with pytest.raises(
        ValueError, match="cast must be one of input, promote, autocast, not 'float'"
    ):
        LigerRMSNorm(16, 1e-5, cast="float")  # type: ignore[arg-type]
