"""The rule for a linear layer and its loss: what it finds, what it computes, and why it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.passes.linear_cross_entropy import LinearCrossEntropy
from tests.engine.graphs import BATCH, TOKENS, Rewritten, differences, rewritten, rows

T = torch.Tensor
WIDTH, VOCAB = 8, 20
Loss = Callable[[Any, T, T], Any]


class Head(nn.Module):
    """A head whose loss is a function of itself, of hidden states and of labels."""

    def __init__(self, loss: Loss, head: nn.Module | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.head = head or nn.Linear(WIDTH, VOCAB, bias=False)
        self.other = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("added", torch.randn(1, VOCAB))

    def forward(self, x: T, labels: T) -> Any:
        return self.loss(self, x, labels)


def labels() -> T:
    marks = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    marks[0, :2] = -100
    return marks


def rewrite(loss: Loss, head: nn.Module | None = None, dtype: Any = torch.float32) -> Rewritten:
    torch.manual_seed(0)
    module = Head(loss, head).to(dtype)
    return rewritten([LinearCrossEntropy()], module, rows(WIDTH, dtype), labels())


def plain(logits: T, marks: T, **options: Any) -> T:
    return F.cross_entropy(logits.view(-1, VOCAB), marks.view(-1), **options)


def shifted(logits: T, marks: T) -> T:
    marks = F.pad(marks, (0, 1), value=-100)[..., 1:].contiguous()
    return plain(logits.float(), marks)


def both(loss: T, logits: T) -> tuple[T, T]:
    return loss, logits


FOUND: dict[str, tuple[Loss, str]] = {
    "plain": (lambda m, x, y: plain(m.head(x), y), "reduction=mean, upcast=False"),
    "shifted": (lambda m, x, y: shifted(m.head(x), y), "reduction=mean"),
    "rows first": (
        lambda m, x, y: F.cross_entropy(m.head(x.flatten(0, 1)), y.flatten()),
        "reduction=mean, upcast=False",
    ),
    "cast after the view": (
        lambda m, x, y: F.cross_entropy(m.head(x).view(-1, VOCAB).float(), y.view(-1)),
        "reduction=mean",
    ),
    "a sum over items": (
        lambda m, x, y: plain(m.head(x), y, reduction="sum") / (y != -100).sum(),
        "reduction=sum, upcast=False",
    ),
    "a sum over a number": (
        lambda m, x, y: plain(m.head(x), y, reduction="sum") / 7,
        "reduction=sum, upcast=False",
    ),
    "multiplied": (
        lambda m, x, y: plain(0.25 * m.head(x), y), "reduction=mean, scale=0.25, upcast=False"
    ),
    "divided": (
        lambda m, x, y: plain(m.head(x) / 8.0, y), "reduction=mean, divisor=8, upcast=False"
    ),
    "soft-capped": (
        lambda m, x, y: plain(torch.tanh(m.head(x) / 5.0) * 5.0, y),
        "reduction=mean, softcap=5, upcast=False",
    ),
    "scaled and soft-capped": (
        lambda m, x, y: shifted(5.0 * torch.tanh(m.head(x) * 2.0 / 5.0), y),
        "reduction=mean, scale=2, softcap=5",
    ),
    "smoothed": (
        lambda m, x, y: plain(m.head(x), y, label_smoothing=0.1),
        "reduction=mean, smoothing=0.1, upcast=False",
    ),
    "another ignored label": (
        lambda m, x, y: plain(m.head(x), y.clamp(min=3), ignore_index=3),
        "reduction=mean, ignore_index=3, upcast=False",
    ),
    "a bias added later": (
        lambda m, x, y: plain(m.head(x) + m.added, y), "reduction=mean, upcast=False"
    ),
    "logits given": (
        lambda m, x, y: both(plain(z := m.head(x), y), z), "reduction=mean, upcast=False"
    ),
    "float logits given": (
        lambda m, x, y: both(plain(z := m.head(x).float(), y), z), "reduction=mean"
    ),
    "more around it": (
        lambda m, x, y: plain(m.head(x.sin()), y) * 2 + x.square().mean(),
        "reduction=mean, upcast=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, biased: bool) -> None:
    if biased and name == "a bias added later":
        pytest.skip("one bias is enough")
    loss, shown = FOUND[name]
    pair = rewrite(loss, nn.Linear(WIDTH, VOCAB, bias=biased))
    assert [site.after for site in pair.done] == ["call_module linear_cross_entropy"]
    assert pair.after.linear_cross_entropy.extra_repr() == shown
    assert "Linear" not in pair.called()
    before = (pair.before(rows(WIDTH), labels()), pair.after(rows(WIDTH), labels()))
    theirs, ours = (out if isinstance(out, tuple) else (out,) for out in before)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a + 0, b)
    assert max(differences(pair, rows(WIDTH), labels())) < 2e-6


def test_logits_alone_stay_a_layer() -> None:
    pair = rewrite(lambda m, x, y: (plain(m.head(x), y), m.other(x)))
    assert pair.called() == ["Linear", "LigerFusedLinearCrossEntropy"] or pair.called() == [
        "LigerFusedLinearCrossEntropy",
        "Linear",
    ]


class Other(nn.Linear):
    pass


def hooked() -> nn.Module:
    layer = nn.Linear(WIDTH, VOCAB)
    layer.register_forward_hook(lambda *args: None)
    return layer


REFUSED: dict[str, tuple[Loss, nn.Module | None, str]] = {
    "another layer": (
        lambda m, x, y: plain(m.head(x), y), Other(WIDTH, VOCAB), "head is a Other, not a plain"
    ),
    "a hook": (lambda m, x, y: plain(m.head(x), y), hooked(), "a hook stands on head"),
    "a call of F.linear": (
        lambda m, x, y: plain(F.linear(x, m.head.weight), y), None, "a call of F.linear"
    ),
    "few classes": (
        lambda m, x, y: F.cross_entropy(m.head(x).view(-1, 3), y.view(-1) % 3),
        nn.Linear(WIDTH, 3), "3 logits take no more memory than the 8 numbers",
    ),
    "chances for labels": (
        lambda m, x, y: F.cross_entropy(m.head(x).view(-1, VOCAB), x.new_ones(15, VOCAB)),
        None, "not one index for each row",
    ),
    "logits read inside": (
        lambda m, x, y: plain(z := m.head(x), y) + z.square().mean(), None, "is also read by"
    ),
    "logits read on the way": (
        lambda m, x, y: plain(z := m.head(x).float(), y) + z.square().mean(),
        None, "is also read by",
    ),
    "weights of classes": (
        lambda m, x, y: plain(m.head(x), y, weight=m.added[0].abs()), None, "weighted is True"
    ),
    "something added": (
        lambda m, x, y: plain(m.head(x) + m.other(x), y), None, "is added to the logits"
    ),
    "no reduction": (
        lambda m, x, y: plain(m.head(x), y, reduction="none"), None, "its reduction is none"
    ),
    "something in between": (
        lambda m, x, y: plain(m.head(x).relu(), y), None, "found relu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    loss, head, words = REFUSED[name]
    pair = rewrite(loss, head)
    assert not pair.done
    assert any(words in reason for reason in pair.reasons), pair.reasons


def test_a_float_divisor_stays_outside() -> None:
    pair = rewrite(lambda m, x, y: plain(m.head(x), y, reduction="sum") / m.added.square().sum())
    assert len(pair.done) == 1 and "div" in pair.code
    assert max(differences(pair, rows(WIDTH), labels())) < 2e-6
