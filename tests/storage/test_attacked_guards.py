"""Attacks by guards over sizes that take for ever, or fail only when they are asked."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liger_fx.errors import LoadError
from liger_fx.storage.expressions import check
from liger_fx.tracing.call import CallSpec, InputSpec
from liger_fx.tracing.guards import Guards, compile_take
from tests.storage.files import edit, guards_in
from tests.storage.hostile import load, refused
from tests.support.families import make_inputs
from tools.fuzz_load import watched


def tower(base: str, height: int) -> str:
    return base if height == 0 else f"({tower(base, height - 1)}**8)"


BAD = [
    f"{tower('batch', 16)} > 1", f"{tower('9', 8)} > 1", f"{tower('batch', 2)} > 1",
    "*".join(["batch**8"] * 8) + " > 1", "1/0 > 1", "1//0 > 1", "batch % 0 > 1", "1/-0 > 1",
    "batch / 0.0 > 1", "max() > 1", "min(1) > 0", "min(batch) > 0", "abs(1, 2) > 0", "abs() > 0",
    "math.floor() > 0", "math.floor(1, 2) > 0", "round() > 0", "round(batch, batch) > 0",
    "round(batch, -10**18) > 0", "round(batch, -999999999) > 0", "round(1, 2, 3) > 0",
    "batch > 1 # and", "(batch >\n1)", "batch > 1\\\n", "batch > 1;1", "batch\t> 1\x0c", "{1} > 1",
]  # fmt: skip
GOOD = [
    "batch >= 2", "8 + (-1)*(sequence % 8) == 3", "Max1 > 1", "max(1, batch, 2) == batch",
    "batch**2*sequence*4*56*3*2*5 > 1", "math.floor(batch / 2) + math.ceil(sequence / 3) < 9",
    "not batch == 1 and (sequence > 2 or batch < 3)", "round(batch * 0.5, 2) > 1",
    "round(batch, -2) > 1", "(batch + sequence)**3 < 1000000", "(batch if sequence > 3 else 2) > 1",
]  # fmt: skip


@pytest.mark.parametrize("guard", BAD)
def test_guards_that_take_for_ever_or_fail(guard: str, saved: Path) -> None:
    edit(saved / "graph.json", lambda d: guards_in(d)["sizes"].append(guard))
    refused(saved, "graph.json.blocks[0].plans[0].guards.sizes[0]")


@pytest.mark.parametrize("guard", GOOD)
def test_guards_that_models_have(guard: str) -> None:
    assert check(guard) == guard


def test_a_watch_knows_guards_by_their_name() -> None:
    """What a process executes can be told by the name of its file."""
    module = nn.Module()
    module.width = 2
    autocast: dict[str, torch.dtype | None] = {}
    guards = Guards(
        CallSpec({}), ("batch > 1", "width > 1"), False, None, autocast, False, {"width": "width"}
    )
    with watched() as seen:
        assert guards.sizes_hold({"batch": 2}) and guards.holds_for_attributes(module)
        assert not guards.sizes_hold({"batch": 1})
    assert seen == []


@pytest.mark.parametrize("guard", ["1 / (batch - 2) > 0", "sequence % (batch - 2) == 0"])
def test_a_guard_that_divides_by_zero_does_not_hold(guard: str, saved: Path) -> None:
    edit(saved / "graph.json", lambda d: guards_in(d)["sizes"].append(guard))
    found = load(saved)
    plain = found.block_class.forward
    inputs = make_inputs(found, batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.allclose(found(**inputs)[0], plain(found, **inputs)[0], atol=1e-5)
    assert len(found.plans) == 2 and found.plans[0].take(found, inputs) is None


def holds(guards: tuple[str, ...], sizes: tuple[int | str, ...], shape: tuple[int, ...]) -> bool:
    call = CallSpec({"x": InputSpec(sizes, torch.float32, torch.device("cpu"))})
    take = compile_take(Guards(call, guards, False, True, {}, False))
    return take(nn.Module(), {"x": torch.zeros(shape)}) is not None


def test_sizes_that_are_called_as_their_places_are() -> None:
    assert holds(("batch > s0",), ("s0", "batch"), (2, 3))
    assert not holds(("batch > s0",), ("s0", "batch"), (3, 3))
    assert holds(("x0 * s0 == 6",), ("x0", "s0"), (2, 3))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="batch ()*/%+-<>=0189.,", max_size=40),
    parts=st.lists(
        st.sampled_from(
            ["batch", "s", "1", "0", "9.5", "(", ")", "**", "*", "/", "//", "%", "-", " > ",
             " and ", "min(", "max(", "abs(", "round(", "math.floor(", ", ", " if ",
             " else ", "not "]
        ),
        max_size=14,
    ),
)  # fmt: skip
def test_what_is_taken_can_be_asked_at_any_size(text: str, parts: list[str]) -> None:
    for guard in (text, "".join(parts)):
        try:
            check(guard, {"batch", "s"})
        except LoadError:
            continue
        for shape in ((0, 0), (1, 2), (2**20, 0)):
            holds((guard,), ("batch", "s"), shape)  # whatever it says, it says it at once
