"""Linear layers of any make stay modules that are called: LoRA's, quantised ones, subclasses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import liger_fx
from tests.support.accuracy import furthest, measure
from tests.support.families import build, make_inputs

ROUNDING = 3e-6


class Int8Linear(nn.Module):
    """A linear layer over int8 weights with a scale a row, as quantisers make them."""

    weight: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale.detach()).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class TwiceLinear(nn.Linear):
    """A subclass that computes something else than nn.Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


def with_lora(model: Any) -> Any:
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = inject_adapter_in_model(LoraConfig(target_modules=names, r=4, lora_alpha=8), model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def replaced(model: Any, make: Any) -> Any:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, make(child))
    return model


def twice(linear: nn.Linear) -> nn.Linear:
    made = TwiceLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made


CHANGES = {
    "lora": with_lora,
    "int8": lambda model: replaced(model, Int8Linear),
    "subclass": lambda model: replaced(model, twice),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_sites_stand_around_them(change: str) -> None:
    model = CHANGES[change](build("llama"))
    opt = liger_fx.optimize(model)
    found = Counter(site.rule for site in opt.report.rewritten)
    assert found.pop("adapted_linear", 0) == (8 if change == "lora" else 0)
    assert found == {"rms_norm": 3, "add_rms_norm": 2, "rotary_embedding": 2, "gated_mlp": 2}
    assert opt.report.opaque == ()
    assert list(opt.state_dict()) == list(model.state_dict())
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert isinstance(opt.get_submodule(path), type(model.get_submodule(path)))
    for train in (False, True):
        model.train(train)
        opt.train(train)
        inputs = make_inputs(model, 2, 9, pad=True, labels=True)
        theirs = measure(model, inputs)
        assert furthest(measure(opt, inputs), theirs) < ROUNDING
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert theirs.gradients.keys() == trained


def test_lora_trains_alone() -> None:
    """The frozen weights get no gradient, the adapters the original's."""
    model = with_lora(build("llama"))
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9, labels=True)
    gradients = measure(opt, inputs).gradients
    assert gradients and all("lora_" in name for name in gradients)
