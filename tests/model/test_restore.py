"""restore: plain classes again around the same weights, equal outputs, saved as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import liger_fx
from liger_fx.errors import UsageError
from liger_fx.modules.origin import NamedModule
from tests.support.families import FAMILIES, build, make_inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_comes_back(name: str) -> None:
    model = build(name)
    opt = liger_fx.optimize(model)
    back = liger_fx.restore(opt)
    ours = {path: type(module) for path, module in back.named_modules()}
    assert ours == {path: type(module) for path, module in model.named_modules()}
    theirs = dict(opt.named_parameters())
    assert all(p is theirs[path] for path, p in back.named_parameters())
    assert list(back.state_dict()) == list(model.state_dict())
    inputs = make_inputs(model, pad=True)
    with torch.no_grad():
        torch.testing.assert_close(back(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert any(isinstance(m, NamedModule) for m in opt.modules())  # opt is as it was


def test_trained_weights_are_saved(tmp_path: Path) -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    with torch.no_grad():
        opt.model.norm.weight.add_(1.0)
    liger_fx.restore(opt).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, opt.model.norm.weight)


def test_anything_else_is_refused() -> None:
    with pytest.raises(UsageError, match="no result of liger_fx.optimize or load"):
        liger_fx.restore(torch.nn.Linear(2, 2))
