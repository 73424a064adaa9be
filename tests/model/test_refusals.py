"""Refused calls are known again by the kinds of their arguments, however these are nested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from liger_fx.model.refusals import Refusals


def nested(tokens: int) -> dict[str, Any]:
    tables = torch.zeros(1, tokens, 4)
    return {"position_embeddings": (tables, [tables]), "packed": {"lengths": tables, "longest": 7}}


def test_no_value_of_a_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("this waits for the device")

    monkeypatch.setattr(torch.Tensor, "__repr__", read)
    refusals, module = Refusals(), nn.Identity()
    refusals.remember(module, nested(3), "a reason")
    assert refusals.reason(module, nested(3)) == "a reason"
    assert refusals.reason(module, nested(5)) is None


def test_plain_values_tell_calls_apart() -> None:
    refusals, module = Refusals(), nn.Identity()
    refusals.remember(module, {"flags": (True, None)}, "a reason")
    assert refusals.reason(module, {"flags": (True, None)}) == "a reason"
    assert refusals.reason(module, {"flags": (False, None)}) is None
