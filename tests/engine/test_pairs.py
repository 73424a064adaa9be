"""Two matches in one node, where there is a place above all readers and below all inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.engine.bend import BendTogether
from tests.engine.graphs import Formula, Rewritten, differences, rewritten, rows

T = torch.Tensor


def together(function: Any) -> Rewritten:
    return rewritten([BendTogether()], Formula(function), rows())


def side_by_side(m: Formula, x: T) -> T:
    q, k = x.sin(), x.cos()
    return torch.cat([m.w * q.tanh(), m.w * k.tanh()], -1)


def the_first_is_read_before_the_second_is_there(m: Formula, x: T) -> T:
    q, k = x.sin(), x.cos()
    inner = k.tanh()
    q = (m.w * q.tanh()).exp()
    return torch.cat([q, m.w * inner], -1)


@pytest.mark.parametrize("function", [side_by_side, the_first_is_read_before_the_second_is_there])
def test_one_node_for_both(function: Any) -> None:
    pair = together(function)
    assert pair.called() == ["BentPair"] and len(pair.done) == 1
    node = next(n for n in pair.traced.graph.nodes if n.op == "call_module")
    assert "spec" not in node.meta and [u.target.__name__ for u in node.users] == ["getitem"] * 2
    specs = [u.meta["spec"].shape for u in node.users]
    assert all(len(shape) == 3 and shape[-1] == 8 for shape in specs)
    assert max(differences(pair, rows())) < 1e-6


def test_the_site_tells_the_two_apart() -> None:
    (site,) = together(side_by_side).sites
    assert site.before == (
        "tanh(x)",
        "mul(weight, tanh)",
        "tanh(x2)",
        "mul(weight, tanh_1)",
    )


def the_second_needs_the_first(m: Formula, x: T) -> T:
    q = m.w * x.tanh()
    return m.w * q.cos().tanh()


def the_second_needs_what_reads_the_first(m: Formula, x: T) -> T:
    q = (m.w * x.tanh()).exp()
    k = (x + q.mean()).cos()
    return torch.cat([q, m.w * k.tanh()], -1)


def another_weight(m: Formula, x: T) -> T:
    return torch.cat([m.w * x.sin().tanh(), m.b * x.cos().tanh()], -1)


def an_effect_between(m: Formula, x: T) -> T:
    y = x.cos()
    q = m.w * x.tanh()
    y.add_(1)
    return torch.cat([q, m.w * y.tanh()], -1)


@pytest.mark.parametrize(
    "function",
    [
        the_second_needs_the_first,
        the_second_needs_what_reads_the_first,
        another_weight,
        an_effect_between,
    ],
)
def test_two_nodes_where_there_is_no_such_place(function: Any) -> None:
    pair = together(function)
    assert pair.called() == ["Bent", "Bent"]
    assert max(differences(pair, rows())) < 1e-6


def test_two_calls_of_one_module_are_not_joined() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x: T) -> T:
            return (self.w * x.tanh()).exp()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: T) -> T:
            return self.part(x.sin()) + self.part(x.cos())

    pair = rewritten([BendTogether()], Both(), rows())
    assert pair.called() == ["Bent", "Bent"]


def test_three_are_a_pair_and_one() -> None:
    def function(m: Formula, x: T) -> T:
        parts = [x.sin(), x.cos(), x.exp()]
        return torch.cat([m.w * part.tanh() for part in parts], -1)

    pair = together(function)
    assert sorted(pair.called()) == ["Bent", "BentPair"]
    assert max(differences(pair, rows())) < 1e-6


def test_the_graph_runs_in_the_order_it_is_written_in() -> None:
    pair = together(the_first_is_read_before_the_second_is_there)
    seen: set[fx.Node] = set()
    for node in pair.traced.graph.nodes:
        assert seen.issuperset(node.all_input_nodes)
        seen.add(node)
