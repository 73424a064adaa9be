"""The rule for a sum and its LayerNorm: where it takes both, what it leaves, what it computes.

What it has in common with that for the RMSNorm is tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from liger_fx.engine.rule import Selection
from liger_fx.modules import LigerAddLayerNorm
from liger_fx.passes.add_layer_norm import AddLayerNorm
from liger_fx.passes.add_rms_norm import AddRMSNorm
from liger_fx.passes.layer_norm import LayerNorm
from liger_fx.passes.rms_norm import RMSNorm
from tests.engine.graphs import Rewritten, differences, rewritten, rows, trace
from tests.passes.test_add_rms_norm import REFUSED, Layer, residual
from tests.passes.test_layer_norm import EPS, MODULES, WIDTH, Cohere, Olmo

T = torch.Tensor
RULES = (AddLayerNorm(), AddRMSNorm(), LayerNorm(), RMSNorm())


def rewrite(
    function: Callable[[Any, T], Any] = residual,
    norm: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Rewritten:
    torch.manual_seed(0)
    layer = Layer(function, norm or nn.LayerNorm(WIDTH, EPS)).to(dtype)
    return rewritten(RULES, layer, rows(WIDTH, dtype), **options)


@pytest.mark.parametrize("kind", MODULES)
def test_the_norm_of_a_sum_takes_its_parts(kind: type[nn.Module]) -> None:
    pair = rewrite(norm=kind())
    assert [(s.rule, s.path, s.after_class) for s in pair.sites] == [
        ("add_layer_norm", "norm", "LigerAddLayerNorm")
    ]
    start, _, end = pair.code.rpartition("\n")
    assert start == (
        "attn = self.attn(x)\nnorm = self.norm(x, attn)\ngetitem = norm[0]\n"
        "getitem_1 = norm[1]\nmlp = self.mlp(getitem)"
    )
    assert end.partition(" = ")[2] == "getitem_1.add(mlp)"
    module = pair.traced.root.norm
    shown = ", ".join(filter(None, ("(12,), eps=0.0003", MODULES[kind])))
    assert isinstance(module, LigerAddLayerNorm) and module.extra_repr() == shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", MODULES)
def test_it_computes_the_same(kind: type[nn.Module], dtype: torch.dtype) -> None:
    if dtype is torch.float64 and kind in (Cohere, Olmo):
        pytest.skip("the model's own code goes down to float32")
    pair = rewrite(norm=kind(), dtype=dtype)
    bound = {torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, 0.02)
    assert pair.done and max(differences(pair, rows(WIDTH, dtype))) < bound


class Post(nn.Module):
    """BERT's: a linear layer, dropout, and the norm of the sum with what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)
        self.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(self, x: T) -> T:
        return self.LayerNorm(self.dropout(self.dense(x)) + x)


@pytest.mark.parametrize("train", [False, True])
def test_a_sum_that_nothing_else_reads(train: bool) -> None:
    pair = rewritten(RULES, nn.Sequential(Post(), Post()).train(train), rows(WIDTH))
    assert [(s.rule, s.path, s.reason) for s in pair.sites] == [
        ("add_layer_norm", "0.LayerNorm", None), ("add_layer_norm", "1.LayerNorm", None)
    ]  # fmt: skip
    assert pair.called()[:3] == ["Linear", "Dropout", "LigerAddLayerNorm"]
    before, after = list[T](), list[T]()
    for module, found in ((pair.before, before), (pair.after, after)):
        torch.manual_seed(0)  # of the dropout
        x = rows(WIDTH).requires_grad_()
        y = module(x)
        found += [y, torch.autograd.grad(y.cos().sum(), x)[0]]
    torch.testing.assert_close(after, before)
    assert (before[0] == pair.before(rows(WIDTH))).all() != train, "the dropout drops"


def inline(m: Any, x: T) -> T:
    s = x + m.attn(x)
    centered = s - s.mean(-1, keepdim=True)
    return s + centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS) * m.scale


FOUND: dict[str, tuple[Callable[[Any, T], Any], nn.Module | None, str]] = {
    "handed out": (lambda m, x: (m.norm(s := x + m.attn(x)), s), None, "norm"),
    "a sum of three": (
        lambda m, x: (s := x + m.attn(x) + m.mlp(x)) * m.norm(s), None, "norm"
    ),
    "no weight, no bias": (residual, nn.LayerNorm(WIDTH, elementwise_affine=False), "norm"),
    "spelled out": (inline, None, "add_layer_norm"),
    "one tensor twice": (lambda m, x: (s := x.sin() + x.sin()) * m.norm(s), None, "norm"),
    "two in a row": (
        lambda m, x: (t := (s := x + m.attn(x)) + m.mlp(m.norm(s))) * m.norm(t), None, "norm"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    function, norm, path = FOUND[name]
    pair = rewrite(function, norm)
    number = 2 if name == "two in a row" else 1
    assert [(s.rule, s.after) for s in pair.sites] == [
        ("add_layer_norm", f"call_module {path}")
    ] * number
    assert max(differences(pair, rows(WIDTH))) < 1e-6
    pair.traced.graph.lint()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, why, stands = REFUSED[name]
    dtype = torch.bfloat16 if name == "written later" else torch.float32
    pair = rewrite(function, Cohere(), dtype)  # which keeps a float32 copy of what is written into
    told = [s.reason or "" for s in pair.sites if s.rule == "add_layer_norm"]
    assert [why in reason for reason in told] == ([True] if why else []), told
    assert [s.rule for s in pair.done] == ["layer_norm"] * len(stands)
    if name not in ("two dtypes", "rounded in between"):
        assert max(differences(pair, rows(WIDTH, dtype))) < (1e-6 if dtype.itemsize == 4 else 0.02)


def test_left_out_it_is_a_plain_norm() -> None:
    pair = rewrite(selection=Selection(excluded=("add_layer_norm",)))
    assert [(s.rule, s.reason is None) for s in pair.sites] == [
        ("add_layer_norm", False), ("layer_norm", True)
    ]  # fmt: skip
    assert pair.called() == ["Linear", "LigerLayerNorm", "Linear"]


def test_traced_again_the_sum_is_taken_again() -> None:
    """A second kind of call meets the named module where the norm was."""
    first = rewrite()
    second = rewritten(RULES, first.traced.root, rows(WIDTH))
    assert second.called() == ["Linear", "LigerAddLayerNorm", "Linear"]
    assert max(differences(second, rows(WIDTH))) == 0
    assert [s.rule for s in second.sites] == ["add_layer_norm"]
    second.traced.root.function = lambda m, x: m.norm(x)
    third = trace(second.traced.root, rows(WIDTH))
    assert [str(n) for n in third.graph.nodes] == ["x", "norm", "output"]
    after = fx.GraphModule(third.root, third.graph)
    torch.testing.assert_close(after(rows(WIDTH)), first.before.norm(rows(WIDTH)))
