"""An operator started again: for other tensors of a kind it gives what it would give anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from liger_fx.kernels import (
    activation,
    add_layer_norm,
    add_rms_norm,
    gated_activation,
    layer_norm,
    qk_norm_rope,
    replay,
    rms_norm,
    rope,
)
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.library import Op
from liger_fx.kernels.replay import Replayed
from tests.kernels.accuracy import DEVICE
from tests.kernels.test_operators import DIRECT

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="about Triton's kernels"
)

MODULES = (
    activation, add_layer_norm, add_rms_norm, gated_activation, layer_norm, qk_norm_rope, rms_norm,
    rope,
)  # fmt: skip
OPERATORS = {
    op.overload: op.run
    for module in MODULES
    for op in vars(module).values()
    if isinstance(op, Op) and isinstance(op.run, Replayed)
}
# Those that copy what lies in no layout of theirs.
COPYING = {
    "add_rms_norm, other strides",
    "add_rms_norm backward",
    "add_rms_norm of heads",
    "add_layer_norm, other strides",
    "add_layer_norm backward",
    "layer_norm strided",
    "layer_norm backward",
    "gated",
    "gated backward",
    "activation backward",
    "rms_norm strided",
    "rms_norm last dimension first",
    "rms_norm backward",
}
CASES = [name for name, case in DIRECT.items() if case()[0].default in OPERATORS]


class Counted:
    """A Replayed of its own, and how often it ran in full."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.count = run, 0
        self.replayed = Replayed(self._run)

    def _run(self, *args: Any) -> Any:
        self.count += 1
        return self.run(*args)

    def check(self, *args: Any) -> None:
        """It gives what the plain run gives, in the same layout, in memory of its own."""
        found, expected = self.replayed(*args), self.run(*args)
        assert type(found) is type(expected)
        for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert torch.equal(a, b)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def on_device(x: torch.Tensor) -> torch.Tensor:
    """A copy in x's strides."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
    return copy.copy_(x.detach())


@pytest.mark.parametrize("name", CASES)
def test_other_tensors_of_a_kind(name: str) -> None:
    op, _ = DIRECT[name]()
    counted = Counted(OPERATORS[op.default].run)
    for _ in range(4):
        _, args = DIRECT[name]()
        counted.check(*tree_map_only(torch.Tensor, on_device, args))
    assert counted.count == (4 if name in COPYING else 2)


def test_every_operator_of_kernels_alone_is_here() -> None:
    assert {DIRECT[name]()[0].default for name in CASES} == set(OPERATORS)
    assert len(OPERATORS) == 18


def test_what_was_one_tensor_may_be_two() -> None:
    """Written down with one tensor given twice, then for two."""
    counted = Counted(add_rms_norm._forward)
    weight, both = draw(16), draw(6, 16)
    one = both[:3]
    for a, b in ((one, one), (one, one), (one, both[3:]), (draw(3, 16), draw(3, 16))):
        counted.check(a, b, weight, 1e-6, 0.0, None)
    assert counted.count == 2


def test_views_of_one_memory_may_lie_apart() -> None:
    counted = Counted(OPERATORS[torch.ops.liger_fx.rope_pair.default].run)
    for packed in (True, True, False):
        qkv, other = draw(2, 5, 4, 16).transpose(1, 2), draw(2, 5, 4, 16).transpose(1, 2)
        q, k = qkv[:, :3], (qkv if packed else other)[:, 3:]
        counted.check(q, k, draw(1, 5, 16), draw(1, 5, 16), *rope.Form(), None, None)
    assert counted.count == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: (x.bfloat16(), w, 1e-6, 0.0, None),
        lambda x, w: (x, w.bfloat16(), 1e-6, 0.0, None),
        lambda x, w: (x, w, 1e-2, 0.0, None),
        lambda x, w: (x, w, 1e-6, 1.0, None),
        lambda x, w: (x, None, 1e-6, 0.0, None),
        lambda x, w: (x, w, 1e-6, 0.0, torch.float16),
        lambda x, w: (x[:2], w, 1e-6, 0.0, None),
        lambda x, w: (x.view(2, 2, 15), w, 1e-6, 0.0, None),
        lambda x, w: (torch.cat((x, x), 1)[:, :15], w, 1e-6, 0.0, None),
        lambda x, w: (torch.cat((x, x), 0).flatten()[1:61].view(4, 15), w, 1e-6, 0.0, None),
    ],
)
def test_other_kinds_are_told_apart(
    other: Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]],
) -> None:
    counted = Counted(rms_norm.norm_forward)
    for _ in range(3):
        counted.check(draw(4, 15), draw(15), 1e-6, 0.0, None)
    before = counted.count
    counted.check(*other(draw(4, 15), draw(15)))
    assert counted.count == before + 1


def test_no_more_kinds_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 3)
    counted = Counted(activation._forward)
    for rows in (1, 2, 3, 4, 1, 2):
        counted.check(draw(rows, 8), "relu")
        assert len(counted.replayed._again) <= 3


def test_an_error_is_not_written_down() -> None:
    counted = Counted(activation._forward)

    def failing(*args: Any) -> Any:
        raise RuntimeError("no memory")

    for _ in range(2):
        counted.run, before = failing, counted.run
        with pytest.raises(RuntimeError, match="no memory"):
            counted.replayed(draw(2, 8), "relu")
        counted.run = before
    counted.check(draw(2, 8), "relu")
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
