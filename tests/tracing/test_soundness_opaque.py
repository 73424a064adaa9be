"""What a module that is not followed returns is of the dtype, rank and sizes that it was traced
with, or an error says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.errors import LigerFxError, ResultError
from tests.support.original import RIGHT, TOLD, Small, beside

T = torch.Tensor


class Opaque(nn.Module):
    """Code that asks the data, and then ``makes`` something."""

    def __init__(self, makes: Any) -> None:
        super().__init__()
        self.makes, self.dtype, self.width = makes, torch.float32, 8

    def forward(self, h: T) -> Any:
        return h * 0 if h.abs().max() > 1e6 else self.makes(self, h)


def model(makes: Any, reads: Any) -> Small:
    return Small(lambda m, x: reads(m, m.opaque(m.lin(x))), opaque=Opaque(makes))


def rows(*sizes: int) -> tuple[T]:
    return (torch.randn(*sizes, 8),)


def heads(m: Any, h: T) -> T:
    if h.shape[-1] != m.lin.out_features:
        return h
    return h.view(h.shape[0], h.shape[1], 2, 4).transpose(1, 2).sum(1) * h.shape[1]


def test_a_size_that_is_always_the_same_is_a_number() -> None:
    same = model(lambda m, h: h * 2, heads)
    assert beside(same, rows(4, 3), [rows(4, 3), rows(2, 5), rows(1, 1)]) == RIGHT


def tied(m: Any, h: T) -> T:
    return h + torch.ones(h.shape[0], 1) if h.shape[0] > 1 else h


def test_a_size_that_is_always_an_argument_s_may_be_asked_for() -> None:
    assert beside(model(lambda m, h: h * 2, tied), rows(4), [rows(4), rows(6)]) == RIGHT


def in_windows(m: Any, h: T) -> T:
    if h.shape[1] % 4:
        raise ValueError("windows are of four rows")
    return h.view(h.shape[0], -1, 4, h.shape[2]).flip(2).view(h.shape)


def test_a_length_of_whole_windows_is_not_that_of_the_trace() -> None:
    """No other length that is tried does, so that nothing tells it from a number."""
    windows = model(in_windows, heads)
    assert beside(windows, rows(2, 12), [rows(2, 12), rows(3, 8), rows(1, 4)]) == RIGHT


def test_each_row_of_an_opaque_result_is_there_at_each_call() -> None:
    def stacked(m: Any, h: T) -> T:
        return torch.stack([row * (i + 1) for i, row in enumerate(h)])

    positive = model(lambda m, h: h[h.sum(-1) > 0], stacked)
    assert beside(positive, rows(9), [rows(9), rows(7)]) == TOLD


CHANGES: dict[str, Any] = {
    "dtype": (lambda m, h: h.to(m.dtype), lambda m, h: m.lin(h.float()) * h.dtype.itemsize),
    "width": (lambda m, h: h[..., : m.width], lambda m, h: h * h.shape[-1]),
    "rank": (lambda m, h: h if m.width == 8 else h[None], lambda m, h: h * h.dim()),
}


def another(opaque: Any) -> None:
    opaque.dtype, opaque.width = torch.float64, 4


@pytest.mark.parametrize("name", CHANGES)
def test_another_result_than_was_traced_is_an_error(name: str) -> None:
    opt = liger_fx.optimize(model(*CHANGES[name]), rows(4))
    opt(*rows(6))
    another(opt.opaque)
    with pytest.raises(ResultError, match="opaque returned torch.float.* when the model was"):
        opt(*rows(4))


@dataclass
class Held:
    """An object that no trace looks into."""

    h: T


VARYING: dict[str, Any] = {
    "dtype": (lambda m, h: h.double() if h.sum() > 0 else h, lambda m, h: h.dtype.itemsize * h),
    "rank": (lambda m, h: h if h.sum() > 0 else h[0], lambda m, h: h * h.dim()),
    "text": (lambda m, h: (h, "a" if h.sum() > 0 else "b"), lambda m, h: h[0] * len(h[1])),
    "object": (lambda m, h: Held(h), lambda m, h: m.lin(h.h)),
    "whether there is one": (lambda m, h: (h, Held(h)), lambda m, h: h[0] * (2 if h[1] else 1)),
}


@pytest.mark.parametrize("name", VARYING)
def test_what_the_data_may_change_is_refused(name: str) -> None:
    with pytest.raises(LigerFxError):
        liger_fx.optimize(model(*VARYING[name]), rows(4))
