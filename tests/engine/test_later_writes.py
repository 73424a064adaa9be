"""A model may write into what it has read, where its own operations kept something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.passes.gated_mlp import GatedMLP
from liger_fx.passes.rms_norm import RMSNorm
from tests.engine.bend import Bend, BendModule, BendOwnOnly
from tests.engine.graphs import Formula, differences, rewritten, rows

T = torch.Tensor
BF16 = torch.bfloat16


class Norm(nn.Module):
    """As Llama writes it: in bf16 it keeps a float32 copy of x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: T) -> T:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Residual(nn.Module):
    """Adds in place what two blocks make of x; the second norm's input is written into as well."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.norm, self.norm2, self.last = nn.Linear(8, 8), Norm(), Norm(), Norm()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: T) -> T:
        x = self.e(x)
        x += self.a(self.norm(x))
        x += self.b(self.norm2(x))
        return self.last(x)


class Cleared(nn.Module):
    """Frees the gate once it is used: relu keeps its result, not what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: T) -> T:
        g = self.a(x)
        h = F.relu(g) * self.b(x)
        g.zero_()
        return h.sin()


def test_a_residual_that_is_added_in_place() -> None:
    """The named module is given the float32 copy, which nothing writes into."""
    x = rows(dtype=BF16)
    pair = rewritten([RMSNorm()], Residual().to(BF16), x)
    assert max(differences(pair, x)) < 0.02
    assert [site.after for site in pair.done] == [
        "call_module norm.rms_norm", "call_module norm2.rms_norm", "call_module last"
    ]  # fmt: skip


def test_where_there_is_no_copy() -> None:
    pair = rewritten([RMSNorm()], Residual(), rows())
    assert [site.after for site in pair.done] == ["call_module last"]
    start = "the backward of LigerRMSNorm needs x, which is written into later (add_("
    assert [reason[: len(start)] for reason in pair.reasons] == [start, start]
    assert all(" at test_later_writes.py:" in reason for reason in pair.reasons)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_gate_that_is_cleared(dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    pair = rewritten([GatedMLP()], Cleared().to(dtype), x)
    assert max(differences(pair, x)) == 0
    (reason,) = pair.reasons
    assert reason.startswith("the backward of LigerReGLU needs gate, which is written into later")


def a_view_is_written_into(m: Formula, x: T) -> T:
    y = x.cos()
    part = y.view(-1, 8)[0]
    z = m.w * y.tanh()
    part.zero_()
    return z


def what_it_is_a_view_of(m: Formula, x: T) -> T:
    y = x.cos()
    z = m.w * y.transpose(0, 1).tanh()
    y[..., 0] = 1
    return z


def by_out(m: Formula, x: T) -> T:
    y = x.cos()
    z = m.w * y.tanh()
    with torch.no_grad():
        torch.sin(z, out=y)
    return z


def by_a_module(m: Formula, x: T) -> T:
    y = x.cos()
    z = m.w * y.tanh()
    return z + m.relu(y)


def of_an_alias(m: Formula, x: T) -> T:
    y = x.cos()
    z = m.w * y.detach().tanh()
    y.mul_(2)
    return z


WRITES = [a_view_is_written_into, what_it_is_a_view_of, by_out, by_a_module, of_an_alias]


class WithRelu(Formula):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.relu = nn.ReLU(inplace=True)


@pytest.mark.parametrize("function", WRITES)
def test_writes_through_views_and_by_other_means(function: Any) -> None:
    pair = rewritten([Bend()], WithRelu(function), rows())
    (reason,) = pair.reasons
    assert "the backward of Bent needs x, which is written into later (" in reason
    assert pair.called().count("Bent") == 0


def before(m: Formula, x: T) -> T:
    y = x.cos()
    y.mul_(2)
    return m.w * y.tanh()


def its_result(m: Formula, x: T) -> T:
    z = m.w * x.cos().tanh()
    return z.add_(1)


def a_copy(m: Formula, x: T) -> T:
    y = x.cos()
    copy = y.clone()
    z = m.w * y.tanh()
    return z + copy.mul_(2)


def nothing_is_kept(m: Formula, x: T) -> T:
    y = x.cos()
    with torch.no_grad():
        z = m.w * y.tanh()
    y.mul_(2)
    return z + y


@pytest.mark.parametrize("function", [before, its_result, a_copy, nothing_is_kept])
def test_writes_that_do_not_matter(function: Any) -> None:
    pair = rewritten([Bend()], Formula(function), rows())
    assert pair.called() == ["Bent"] and max(differences(pair, rows())) < 1e-6


def test_without_gradients_it_does_not_matter_either() -> None:
    with torch.no_grad():
        pair = rewritten([Bend()], Formula(what_it_is_a_view_of), rows())
        assert pair.called() == ["Bent"]
        assert torch.equal(pair.before(rows()), pair.after(rows()))


class BendTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bend = BendModule()

    def forward(self, x: T) -> T:
        x = x.cos()
        y = self.bend(x)
        x += 1
        return self.bend(x) + y


def test_a_module_stays_where_one_of_its_calls_has_to() -> None:
    pair = rewritten([BendOwnOnly()], BendTwice(), rows())
    first, second = pair.reasons
    assert first.startswith("the backward of Bent needs x, which is written into later (add_(")
    assert second.startswith("other calls of bend do something else")
    assert max(differences(pair, rows())) == 0 and pair.called() == []
