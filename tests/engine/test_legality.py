"""What no rule may do: take a result away that something else reads, or move across an effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.bend import Bend
from tests.engine.graphs import Formula, differences, rewritten, rows

T = torch.Tensor


def bend(function: Any, *inputs: T) -> Any:
    return rewritten([Bend()], Formula(function), *(inputs or (rows(),)))


def test_an_inner_result_that_something_else_reads() -> None:
    def function(m: Formula, x: T) -> T:
        inner = x.tanh()
        return m.w * inner + inner.cos()

    pair = bend(function)
    (reason,) = pair.reasons
    assert reason.startswith("an inner result is also read by cos(tanh) (tanh(x) at test_legality")
    assert pair.called() == [] and differences(pair, rows())[0] == 0


def test_an_inner_result_that_the_model_returns() -> None:
    def function(m: Formula, x: T) -> Any:
        inner = x.tanh()
        return m.w * inner, inner

    (reason,) = bend(function).reasons
    assert reason.startswith("an inner result is also read by output")


def test_a_cast_and_a_view_stay_for_their_other_reader() -> None:
    def function(m: Formula, x: T) -> T:
        wide, weight = x.float(), m.w.float()
        return (weight * wide.tanh()).to(x.dtype) + wide.cos() + weight

    pair = bend(function, rows(dtype=torch.bfloat16))
    assert pair.called() == ["Bent"]
    assert [n.target for n in pair.traced.graph.nodes if n.op == "call_method"].count("float") == 2


def test_the_whole_result_may_be_read_by_many() -> None:
    def function(m: Formula, x: T) -> T:
        y = m.w * x.tanh()
        return y.sin() + y.cos() * y

    pair = bend(function)
    assert pair.called() == ["Bent"] and max(differences(pair, rows())) < 1e-6


def changes_x(m: Formula, x: T) -> T:
    y = x.cos()
    inner = y.tanh()
    y.add_(1)
    return m.w * inner + y


def writes_into_x(m: Formula, x: T) -> T:
    y = x.cos()
    inner = y.tanh()
    y[..., 0] = 0
    return m.w * inner + y


def loses_grad(m: Formula, x: T) -> T:
    with torch.no_grad():
        inner = x.tanh()
    return m.w * inner + x


def leaves_autocast(m: Formula, x: T) -> T:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inner = x.tanh()
    return m.w * inner + x


MIDDLE = {
    changes_x: "add_(cos, 1) works in place in the middle of it",
    writes_into_x: "setitem(cos, [..., 0], 0) works in place in the middle of it",
    loses_grad: "the grad or autocast mode changes in the middle of it",
    leaves_autocast: "the grad or autocast mode changes in the middle of it",
}


@pytest.mark.parametrize("function", MIDDLE)
def test_an_effect_in_the_middle(function: Any) -> None:
    pair = bend(function)
    (reason,) = pair.reasons
    assert reason.startswith(MIDDLE[function])
    assert pair.called() == [] and max(differences(pair, rows())) == 0


def before_and_after(m: Formula, x: T) -> T:
    y = x.cos()
    y.mul_(2)
    y = m.w * y.tanh()
    return y.add_(1)


def inside_no_grad(m: Formula, x: T) -> T:
    with torch.no_grad():
        y = m.w * x.tanh()
    return y + x


@pytest.mark.parametrize("function", [before_and_after, inside_no_grad])
def test_effects_around_it_stay_where_they_are(function: Any) -> None:
    pair = bend(function)
    assert pair.called() == ["Bent"] and max(differences(pair, rows())) < 1e-6
    effects = {"mul_", "add_", torch._C._set_grad_enabled}
    assert sum(node.target in effects for node in pair.traced.graph.nodes) == 2


def test_an_in_place_operator_is_no_part_of_a_pattern() -> None:
    pair = bend(lambda m, x: x.cos().tanh_() * m.w)
    assert pair.sites == [] and pair.called() == []


def on_its_own(m: Formula, x: T) -> T:
    return x.tanh().mul_(m.w)


def as_an_operator(m: Formula, x: T) -> T:
    y = x.tanh()
    y *= m.w
    return y.cos()


@pytest.mark.parametrize("function", [on_its_own, as_an_operator])
def test_a_product_in_place_of_what_nothing_else_reads(function: Any) -> None:
    pair = bend(function)
    assert pair.called() == ["Bent"]
    with torch.no_grad():
        torch.testing.assert_close(pair.after(rows()), pair.before(rows()))


def of_a_weight(m: Formula, x: T) -> T:
    with torch.no_grad():
        return m.w.mul_(x[0, 0].tanh())


def test_a_product_in_place_of_what_is_not_its_own() -> None:
    pair = bend(of_a_weight)
    (reason,) = pair.reasons
    assert reason.startswith("it works in place on what may be a part of something else (mul_(w, ")
    assert pair.called() == []
