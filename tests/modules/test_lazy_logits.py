"""Lazy logits: what reads them and what does not, what they then are, and when it is too late."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from liger_fx.modules.lazy_logits import LazyLogits, lazy_logits

T = torch.Tensor


class Head:
    """A linear layer that counts how often it is asked, and tensors to ask it about."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.asked = 0
        self.h = torch.randn(2, 3, 4).to(dtype).requires_grad_()
        self.weight = torch.randn(7, 4).to(dtype).requires_grad_()
        self.bias = torch.randn(7).to(dtype).requires_grad_()

    def __call__(self, h: T, weight: T, bias: T | None) -> T:
        self.asked += 1
        return F.linear(h, weight, bias)

    def lazy(self) -> T:
        return lazy_logits(self, self.h.dtype, self.h, self.weight, self.bias)

    def plain(self) -> T:
        return F.linear(self.h, self.weight, self.bias)


@pytest.fixture
def head() -> Head:
    torch.manual_seed(0)
    return Head()


WALKS: dict[str, Callable[[T], Any]] = {
    "metadata": lambda x: (
        x.shape, x.dtype, x.device, x.requires_grad, x.grad_fn, x.dim(), x.size(), x.numel(),
        x.is_floating_point(), x.stride(), x.is_cuda, len(x), x.ndim,
    ),
    "isinstance": lambda x: isinstance(x, torch.Tensor) and torch.is_tensor(x),
    "detach": lambda x: x.detach(),
    "to another dtype": lambda x: x.half().float().to(torch.bfloat16).double(),
    "to its own device": lambda x: x.to("cpu").cpu(),
    "a hook": lambda x: x.register_hook(lambda grad: grad),
    "a tree": lambda x: pytree.tree_map(lambda t: t, {"logits": [x]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_over_it_reads_nothing(name: str, head: Head) -> None:
    lazy, plain = head.lazy(), head.plain()
    WALKS[name](lazy)
    assert head.asked == 0
    assert (lazy.shape, lazy.stride(), lazy.dtype) == (plain.shape, plain.stride(), plain.dtype)


READS: dict[str, Callable[[T], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "an element": lambda x: x[0, 1, 2].item(),
    "a part": lambda x: x[..., :-1, :].contiguous(),
    "a function": lambda x: F.softmax(x, -1),
    "an operator": lambda x: 2 * x + x,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "float, cpu, numpy": lambda x: torch.from_numpy(x.detach().float().cpu().numpy()),
    "a list": lambda x: torch.tensor(x.tolist()),
    "cat": lambda x: torch.cat([x, x]),
    "copy_": lambda x: torch.zeros(2, 3, 7).copy_(x.detach()),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "save": lambda x: _saved(x.detach()),
    "repr": lambda x: repr(x.detach()),
    "an operation in place": lambda x: x.detach().clone().masked_fill_(x.detach() > 0, 0.0) + 0,
    "clone": lambda x: x.clone(),
    "bool": lambda x: bool((x > 0).any()),
    "out=": lambda x: torch.mul(x.detach(), 2, out=torch.empty(2, 3, 7)),
}  # fmt: skip


def _saved(x: T) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("name", READS)
def test_reading_computes_it_once(name: str, head: Head) -> None:
    lazy, plain = head.lazy(), head.plain()
    for _ in range(2):
        found, wanted = READS[name](lazy), READS[name](plain)
        assert not isinstance(found, LazyLogits)
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted)
            assert found.requires_grad == wanted.requires_grad
        else:
            assert found == wanted
    assert head.asked == 1


def test_what_was_derived_is_computed_with_it(head: Head) -> None:
    lazy = head.lazy()
    parts = [lazy.detach(), lazy.half(), lazy.detach().double(), lazy.half().float()]
    assert head.asked == 0
    for part in parts:
        torch.testing.assert_close(part + 0, head.plain().to(part.dtype), rtol=1e-3, atol=1e-3)
    assert head.asked == 1


COPIES: dict[str, Callable[[T], T]] = {
    "clone": lambda x: x.clone(),
    "double": lambda x: x.double(),
    "of a copy": lambda x: x.double().to(torch.complex64),
    "of what was read": lambda x: x.double() if x.sum().item() else x,
}


WRITES: list[Callable[[T], T]] = [
    lambda x: x.mul_(3),
    lambda x: x[0].zero_(),
    lambda x: x.add_(x),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_of_what_was_there(name: str, write: Callable[[T], T], head: Head) -> None:
    lazy, plain = head.lazy().detach(), head.plain().detach()
    copied, expected = COPIES[name](lazy), COPIES[name](plain)
    write(lazy)
    write(plain)
    torch.testing.assert_close(copied + 0, expected)
    torch.testing.assert_close(lazy + 0, plain)


def test_writing_into_it(head: Head) -> None:
    lazy, plain = head.lazy().detach(), head.plain().detach()
    assert lazy.mul_(2) is lazy
    plain.mul_(2)
    lazy[0] = 1.0
    plain[0] = 1.0
    torch.testing.assert_close(lazy + 0, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [False, True])
def test_gradients(dtype: torch.dtype, cast: bool) -> None:
    head = Head(dtype)
    inputs = (head.h, head.weight, head.bias)

    def gradients(x: T) -> Any:
        x = x.float() if cast else x
        return torch.autograd.grad((x.square() * 0.1 + x.sin()).sum(), inputs)

    torch.testing.assert_close(gradients(head.lazy()), gradients(head.plain()))


def test_only_wanted_gradients(head: Head) -> None:
    head.weight.requires_grad_(False)
    head.lazy().sum().backward()
    assert head.weight.grad is None
    torch.testing.assert_close(head.h.grad, head.weight.sum(0).expand(2, 3, 4))


@pytest.mark.parametrize("changed", ["h", "weight", "bias"])
def test_too_late(changed: str, head: Head) -> None:
    lazy, read = head.lazy(), head.lazy()
    expected = (read + 0).detach()
    with torch.no_grad():
        getattr(head, changed).add_(1)
    with pytest.raises(RuntimeError, match="were changed since"):
        lazy.argmax(-1)
    assert lazy.shape == (2, 3, 7)  # which is no reading
    torch.testing.assert_close(read.detach() + 0, expected)  # it was kept


def test_freed_weight_is_too_late(head: Head) -> None:
    """FSDP frees a gathered weight's memory after the forward."""
    lazy = head.lazy()
    head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="were changed since"):
        lazy.sum()


def test_autocast_where_it_is_read_changes_nothing(head: Head) -> None:
    lazy, expected = head.lazy(), head.plain()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lazy + 0, expected)


def test_it_lets_go_of_its_inputs(head: Head) -> None:
    import weakref

    lazy = head.lazy().detach()
    watched = weakref.ref(lazy._reading.inputs[0])  # type: ignore[attr-defined]
    _ = lazy + 0
    assert watched() is None
