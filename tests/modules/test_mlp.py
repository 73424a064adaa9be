"""The MLP modules stand in for the models' own, around the very same linear layers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.modules import (
    LigerGEGLU,
    LigerGEGLUMLP,
    LigerMLP,
    LigerReGLU,
    LigerReGLUMLP,
    LigerSwiGLU,
    LigerSwiGLUMLP,
)

Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, tuple[Activation, type[nn.Module], type[nn.Module]]] = {
    "silu": (F.silu, LigerSwiGLUMLP, LigerSwiGLU),
    "gelu": (F.gelu, LigerGEGLUMLP, LigerGEGLU),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), LigerGEGLUMLP, LigerGEGLU),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), LigerGEGLUMLP, LigerGEGLU),
    "relu": (F.relu, LigerReGLUMLP, LigerReGLU),
    "relu_squared": (lambda x: F.relu(x).square(), LigerReGLUMLP, LigerReGLU),
}
activations = pytest.mark.parametrize("name", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def separate() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "gate_proj": nn.Linear(32, 96, bias=False),
        "up_proj": nn.Linear(32, 96),
        "down_proj": nn.Linear(96, 32),
    }


def packed() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"gate_up_proj": nn.Linear(32, 192), "down_proj": nn.Linear(96, 32)}


def results(call: Callable[[torch.Tensor], torch.Tensor], layers: Any) -> list[torch.Tensor]:
    """The output for one input, then the gradients of the input and of all parameters."""
    parameters = [p for layer in layers for p in layer.parameters()]
    torch.manual_seed(1)
    x = torch.randn(4, 16, 32).to(parameters[0].dtype).requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.double().square().sum(), (x, *parameters))]


def closer(
    ours: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor], factor: float
) -> None:
    """||ours - exact|| <= factor * ||eager - exact||, with room for float32's own rounding."""
    groups = (ours, eager, exact)
    mine, theirs, true = (torch.cat([t.double().flatten() for t in group]) for group in groups)
    assert (mine - true).norm() <= factor * (theirs - true).norm() + 1e-7 * true.norm()


def check(
    layers: dict[str, nn.Module], module: nn.Module, plain: Callable[..., Any], dtype: torch.dtype
) -> None:
    """The module in `dtype` as close to `plain` in float64 as `plain` in `dtype` is."""
    exact_layers = copy.deepcopy(layers)
    for layer in layers.values():
        layer.to(dtype)
    for mine, theirs in zip(exact_layers.values(), layers.values(), strict=True):
        mine.load_state_dict(theirs.state_dict())
        mine.double()
    ours = results(module, layers.values())
    eager = results(lambda x: plain(x, *layers.values()), layers.values())
    exact = results(lambda x: plain(x, *exact_layers.values()), exact_layers.values())
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    closer(ours[:1], eager[:1], exact[:1], 1.1)
    closer(ours[1:], eager[1:], exact[1:], 1.1)
    for one in zip(ours, eager, exact, strict=True):
        closer([one[0]], [one[1]], [one[2]], 1.5)


@activations
@dtypes
def test_gated(name: str, dtype: torch.dtype) -> None:
    function, cls, _ = ACTIVATIONS[name]
    layers = separate()
    module = cls(layers, gate="gate_proj", up="up_proj", down="down_proj", activation=name)
    check(layers, module, lambda x, gate, up, down: down(function(gate(x)) * up(x)), dtype)


@activations
@pytest.mark.parametrize("gate_first", [True, False])
def test_packed(name: str, gate_first: bool) -> None:
    function, cls, _ = ACTIVATIONS[name]
    layers = packed()
    roles = {"gate_up": "gate_up_proj", "down": "down_proj"}
    module = cls(layers, **roles, gate_first=gate_first, activation=name)

    def plain(x: torch.Tensor, gate_up: nn.Module, down: nn.Module) -> torch.Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)[:: 1 if gate_first else -1]
        return down(function(gate) * up)

    check(layers, module, plain, torch.float32)


@activations
@dtypes
def test_plain(name: str, dtype: torch.dtype) -> None:
    function = ACTIVATIONS[name][0]
    layers: dict[str, nn.Module] = {"fc1": nn.Linear(32, 96), "fc2": nn.Linear(96, 32)}
    module = LigerMLP(layers, fc1="fc1", fc2="fc2", activation=name)
    check(layers, module, lambda x, fc1, fc2: fc2(function(fc1(x))), dtype)


@activations
def test_product_alone(name: str) -> None:
    function, _, cls = ACTIVATIONS[name]
    gate, up = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(cls(name)(gate, up), function(gate) * up)
    both = torch.cat((gate, up), dim=-1)
    torch.testing.assert_close(cls(name)(both), function(gate) * up)
    torch.testing.assert_close(cls(name, gate_first=False)(both), function(up) * gate)
    assert list(cls(name).state_dict()) == []


def test_holds_the_original_layers_in_their_order() -> None:
    layers = separate()
    module = LigerSwiGLUMLP(layers, down="down_proj", up="up_proj", gate="gate_proj")
    assert dict(module.named_children()) == layers
    assert list(module.state_dict()) == [
        "gate_proj.weight", "up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"
    ]  # fmt: skip
    seen: list[str] = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    module(torch.randn(1, 32))
    assert seen == ["gate_proj", "up_proj", "down_proj"]


def test_layers_of_any_kind() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x, x), dim=-1)

    layers: dict[str, nn.Module] = {"wi": Doubled(), "wo": nn.Identity()}
    module = LigerReGLUMLP(layers, gate_up="wi", down="wo")
    torch.testing.assert_close(module(torch.tensor([-2.0, 3.0])), torch.tensor([0.0, 9.0]))
    assert "activation=relu, packed" in repr(module)


def test_copies_and_moves_like_a_module() -> None:
    module = LigerGEGLUMLP(packed(), gate_up="gate_up_proj", down="down_proj")
    x = torch.randn(3, 32)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is LigerGEGLUMLP
        assert other.down_proj is not module.down_proj
        assert torch.equal(other(x), module(x))
        assert other.to(torch.float64)(x.double()).dtype == torch.float64
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == x.shape


def test_repr() -> None:
    layers = separate()
    gated = LigerSwiGLUMLP(layers, gate="gate_proj", up="up_proj", down="down_proj")
    assert repr(gated).splitlines()[:2] == ["LigerSwiGLUMLP(", "  32 -> 96, activation=silu"]
    both = LigerGEGLUMLP(packed(), gate_up="gate_up_proj", down="down_proj", gate_first=False)
    assert "  32 -> 96, activation=gelu, packed, gate_first=False\n" in repr(both)
    plain = LigerMLP(layers, fc1="up_proj", fc2="down_proj", activation="gelu_tanh")
    assert "  32 -> 96, activation=gelu_tanh\n" in repr(plain)
    assert repr(LigerGEGLU("gelu_tanh", width=24)) == "LigerGEGLU(24, activation=gelu_tanh)"


def test_what_is_refused() -> None:
    layers = separate()
    roles: dict[str, Any] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    with pytest.raises(ValueError, match="LigerSwiGLUMLP computes silu, not gelu"):
        LigerSwiGLUMLP(layers, **roles, activation="gelu")
    with pytest.raises(
        ValueError, match="LigerGEGLU computes gelu or gelu_tanh or quick_gelu, not relu"
    ):
        LigerGEGLU("relu")
    with pytest.raises(ValueError, match="up='wu' is not among the children"):
        LigerSwiGLUMLP(layers, **roles | {"up": "wu"})
    for wrong in ({"gate": "gate_proj"}, {"gate": "gate_proj", "gate_up": "up_proj"}, {}):
        with pytest.raises(ValueError, match="names of gate and up, or of gate_up alone"):
            LigerSwiGLUMLP(layers, down="down_proj", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        LigerMLP(layers, fc1="up_proj", fc2="down_proj", activation="tanh")
    with pytest.raises(ValueError, match="fc1='fc1' is not among the children"):
        LigerMLP(layers, fc1="fc1", fc2="down_proj", activation="relu")
