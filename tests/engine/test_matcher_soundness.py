"""The matcher takes two things for one only if they are: kinds of numbers, values, modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_fx
from tests.support.original import Small, beside

T = torch.Tensor
BIG = torch.tensor([2**24 + 1] * 8)  # float32 has no such number
COMPLEX = torch.randn(4, 8, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0))


def x() -> T:
    return torch.randn(4, 8)


def squared(v: T) -> T:
    return v.pow(2).mean(-1, keepdim=True)


NUMBERS: dict[str, tuple[Any, T]] = {
    "relu of integers times floats": (lambda m, x, i: (m.lin(x), F.relu(i) * torch.ones(8)), BIG),
    "relu of integers times integers": (lambda m, x, i: (m.lin(x), F.relu(i) * i), BIG),
    "silu of complex numbers": (lambda m, x, c: (m.lin(x), F.silu(c) * c.flip(0)), COMPLEX),
    "the norm of complex numbers": (
        lambda m, x, c: (m.lin(x), c * torch.rsqrt(squared(c) + 1e-6)), COMPLEX,
    ),
    "integers for the weight of a norm": (
        lambda m, x, i: m.lin(x) * torch.rsqrt(squared(m.lin(x)) + 1e-6) * i, BIG,
    ),
    "integers beside the gate": (lambda m, x, i: F.silu(m.lin(x)) * i, BIG.expand(4, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_integers_and_complex_numbers_are_no_activations_and_norms(name: str) -> None:
    forward, given = NUMBERS[name]
    beside(Small(forward), (x(), given))


def turned(q: T, cos: T, sin: T) -> T:
    half = torch.cat((-q[..., 4:], q[..., :4]), -1)
    return q * cos.unsqueeze(1) + half * sin.unsqueeze(1)


@pytest.mark.parametrize("kind", ["integers", "complex", "integer tables"])
def test_only_floats_are_turned(kind: str) -> None:
    q = torch.randn(2, 2, 5, 8)
    cos: T = torch.randn(1, 5, 8)
    if kind == "integers":
        q, cos = (q * 9).long() * 2**24 + 1, (cos * 9).long()
    elif kind == "complex":
        q = torch.complex(q, q.cos())
    else:
        cos = (cos * 9).long() * 2**24 + 1
    model = Small(lambda m, x, q, cos, sin: (m.lin(x), turned(q, cos, sin)))
    beside(model, (x(), q, cos, cos + 1), grad=False)


def test_what_is_turned_twice_is_turned_twice() -> None:
    def forward(m: Any, x: T, q: T, cos: T, sin: T) -> Any:
        once = turned(q, cos, sin)
        return m.lin(x), turned(once, cos, sin), turned(turned(once.tanh(), cos, sin), cos, sin)

    cos = torch.randn(1, 5, 8)
    beside(Small(forward), (x(), torch.randn(2, 2, 5, 8), cos, cos.sin()))


class TwoRoles(nn.Module):
    """gate and up are exchanged where ``asks`` is so of what is handed in."""

    def __init__(self, asks: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.asks = asks

    def forward(self, x: T) -> T:
        gate, up = (self.gate, self.up) if self.asks(x) else (self.up, self.gate)
        return self.down(F.silu(gate(x)) * up(x))


class TwoOrders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: T) -> T:
        first, second = (self.one, self.other) if x.dim() == 3 else (self.other, self.one)
        return second(F.gelu(first(x)))


class TwoEps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: T) -> T:
        eps = 1e-6 if x.ndim == 2 else 1.0
        return self.weight * (x * torch.rsqrt(squared(x) + eps))


MODULES: dict[str, Any] = {
    "gate and up by rank": lambda: TwoRoles(lambda x: x.ndim == 3),
    "gate and up by length": lambda: TwoRoles(lambda x: x.shape[0] > 4),
    "gate and up by the grad mode": lambda: TwoRoles(lambda x: torch.is_grad_enabled()),
    "first and second": TwoOrders,
    "eps": TwoEps,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_shared_only_where_it_does_the_same(name: str) -> None:
    both = Small(lambda m, x: m.mlp(x) + m.mlp(x[None])[0], mlp=MODULES[name]())
    beside(both, (x(),))
    calls = [(torch.randn(8, 8),), (torch.randn(1, 4, 8),), (x(),)]
    beside(Small(lambda m, x: m.mlp(x), mlp=MODULES[name]()), (x(),), calls)
    with torch.no_grad():
        beside(Small(lambda m, x: m.mlp(x), mlp=MODULES[name]()), (x(),), grad=False)


def test_a_module_that_has_taken_a_place_serves_other_modes() -> None:
    model = Small(lambda m, x: m.mlp(x), mlp=TwoRoles(lambda x: torch.is_grad_enabled()))
    opt = liger_fx.optimize(model, (given := x(),))
    with torch.no_grad():
        expected = model(given)
        torch.testing.assert_close(opt(given), expected)


def writes_between(m: Any, x: T) -> T:
    h = m.lin(x)
    product = h * 1.5
    view = product.view(-1)
    before = product * x
    view.add_(1.0)
    return before * torch.sigmoid(product * x) * h


def writes_between_norms(m: Any, x: T) -> T:
    h = m.lin(x) * 1.5
    view, before = h.view(-1), h * x
    view.add_(1.0)
    return before * torch.rsqrt(squared(h * x) + 1e-6)


def a_module_writes_between(m: Any, x: T) -> T:
    h = m.lin(x) + 0
    view = h.view(-1).view(4, 8)
    before = view * x
    m.relu(h)
    return before * torch.sigmoid(view * x) * x


def of_two_roundings(m: Any, x: T) -> T:
    h = m.lin(x) * 100
    return h.bfloat16().float() * torch.sigmoid(h.half().float()) * h


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: T) -> T:
        return x @ self.weight + torch.randn_like(x)


class NoisyLinear(Noisy):
    """A linear layer by its name, and another at each call."""


VALUES: dict[str, Any] = {
    "two dropouts": lambda m, x: F.dropout(h := m.lin(x)) * torch.sigmoid(F.dropout(h)) * h.cos(),
    "two dropouts of a norm": lambda m, x: (
        F.dropout(h := m.lin(x)) * torch.rsqrt(squared(F.dropout(h)) + 1e-6)
    ),
    "two calls of a dropout": lambda m, x: (
        m.drop(h := m.lin(x)) * torch.sigmoid(m.drop(h)) * h.cos()
    ),
    "two calls of a noisy layer": lambda m, x: m.noisy(x) * torch.sigmoid(m.noisy(x)) * m.lin(x),
    "before and after a write": writes_between,
    "a norm before and after a write": writes_between_norms,
    "before and after a module that writes": a_module_writes_between,
    "two roundings": of_two_roundings,
}


@pytest.mark.parametrize("name", VALUES)
def test_two_values_are_one_only_if_they_are(name: str) -> None:
    modules = {"drop": nn.Dropout(), "noisy": NoisyLinear(), "relu": nn.ReLU(inplace=True)}
    beside(Small(VALUES[name], **modules), (x(),))


def test_a_sum_that_nothing_reads_again_is_still_a_norms() -> None:
    def forward(m: Any, x: T) -> T:
        total = m.lin(x) + x
        normed = m.norm(total)
        _ = total + normed
        return normed

    assert beside(Small(forward), (x(),)) == "right"


def gated_without_gradients(m: Any, x: T) -> list[T]:
    h = m.lin(x)
    with torch.no_grad():
        h = h.reshape(-1, 8)
    return [h, F.silu(h) * h]


def gated_by_what_had_gradients(m: Any, x: T) -> list[T]:
    h = m.lin(x)
    with torch.no_grad():
        still = h.view(-1, 8)
    return [still, F.silu(h) * still, F.silu(still) * h]


@pytest.mark.parametrize("forward", [gated_without_gradients, gated_by_what_had_gradients])
def test_an_alias_without_gradients_is_not_what_has_them(forward: Any) -> None:
    beside(Small(forward), (x(),))
