"""Norm and turn in one operator: as near to float64 as a model's code and as the two operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_fx.kernels import qk_norm_rope as kernel
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.qk_norm_rope import MAX_WIDTH, qk_norm_rope
from liger_fx.kernels.rms_norm import rms_norm
from liger_fx.kernels.rope import rope_pair
from tests.kernels.accuracy import (
    DTYPES,
    FLOAT32_SLACK,
    Draw,
    doubled,
    drawing,
    far_apart,
    relative_error,
    rounded,
    with_gradients,
)
from tests.kernels.test_rope import forms, tables, textbook

T = torch.Tensor
EPS = 1e-5
PLAIN = {"interleaved_in": False, "interleaved_out": False, "half_tables": False}


def as_models_do(cos: T, sin: T, offset: float = 0.0, **form: Any) -> Callable[..., Any]:
    """In the dtype of what comes in, as formulas in a paper."""

    def heads(x: T, weight: T) -> T:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        return textbook(x * root * (weight + offset), cos, sin, **(form or PLAIN))

    return lambda q, k, a, b: (heads(q, a), heads(k, b))


def in_two(cos: T, sin: T, offset: float = 0.0, **form: Any) -> Callable[..., Any]:
    return lambda q, k, a, b: rope_pair(
        rms_norm(q, a, EPS, offset), rms_norm(k, b, EPS, offset), cos, sin, **form
    )


def in_one(cos: T, sin: T, offset: float = 0.0, **form: Any) -> Callable[..., Any]:
    return lambda q, k, a, b: qk_norm_rope(q, k, a, b, cos, sin, EPS, offset, **form)


def best(
    leaves: Sequence[T], exact: Sequence[T], cos: T, sin: T, offset: float, **form: Any
) -> Any:
    """What the best kernel stores: the norm rounded, and the turn of it; each gradient, once."""
    dtype, results = leaves[0].dtype, []
    for x, weight in ((leaves[0], leaves[2]), (leaves[1], leaves[3])):
        x, weight = doubled((x, weight))
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (weight + offset)
        turned = textbook(rounded(normed, dtype).double(), *doubled((cos, sin)), **(form or PLAIN))
        results.append(rounded(turned, dtype))
    return *results, *(rounded(grad, dtype) for grad in exact[2:])


def assert_near(
    leaves: Sequence[T], grads: Sequence[T], cos: T, sin: T, offset: float = 0.0, **form: Any
) -> list[T]:
    """Results and gradients at most 1.1 times as far from float64 as the best kernel's, in float32
    as a model's code; those of q and of k by themselves, too. Returns them."""
    ours = with_gradients(in_one(cos, sin, offset, **form), leaves, *grads)
    in_float64 = as_models_do(cos.double(), sin.double(), offset, **form)
    exact = with_gradients(in_float64, doubled(leaves), *grads)
    others = best(leaves, exact, cos, sin, offset, **form)
    if leaves[0].dtype == torch.float32:
        others = with_gradients(as_models_do(cos, sin, offset, **form), leaves, *grads)
    for place in (0, 1):
        alone = with_gradients(
            lambda x, w: qk_norm_rope(x, None, w, None, cos, sin, EPS, offset, **form),
            leaves[place::2],
            grads[place],
        )
        for found in (alone, ours[place::2]):
            for mine, other, true in zip(found, others[place::2], exact[place::2], strict=True):
                assert mine.shape == true.shape and mine.dtype == leaves[0].dtype
                assert (
                    relative_error(mine, true) <= 1.1 * relative_error(other, true) + FLOAT32_SLACK
                )
    return ours


def weights(draw: Draw, dim: int) -> tuple[T, T]:
    return draw(dim), draw(dim)


@forms
@pytest.mark.parametrize("width, dim", [(8, 8), (6, 10), (12, 12)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form(
    form: dict[str, Any], width: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    draw = drawing(dtype)
    q, k, (a, b) = draw(2, 3, 5, dim), draw(2, 1, 5, dim), weights(draw, dim)
    cos, sin = tables(2, 5, width // 2 if form["half_tables"] else width, device, dtype)
    grads = draw(2, 3, 5, dim), draw(2, 1, 5, dim)
    ours = assert_near((q, k, a, b), grads, cos, sin, 1.0, **form)
    if dtype == torch.float32 and device != "cpu":
        return  # the compiler of kernels contracts products and sums as it likes
    for x, weight, grad, place in ((q, a, grads[0], 0), (k, b, grads[1], 1)):
        alone = with_gradients(
            lambda x, w: qk_norm_rope(x, None, w, None, cos, sin, EPS, 1.0, **form),
            (x, weight),
            grad,
        )
        assert all(map(torch.equal, alone, ours[place::2]))


HEADS: dict[str, Callable[[Draw, int, int], T]] = {
    "heads first": lambda draw, heads, dim: draw(2, heads, 5, dim),
    "tokens first": lambda draw, heads, dim: draw(2, 5, heads, dim).transpose(1, 2),
    "part of a packed projection": lambda draw, heads, dim: draw(2, 5, heads + 4, dim)[
        :, :, 2:-2
    ].transpose(1, 2),
    "part of a head": lambda draw, heads, dim: draw(2, heads, 5, 2 * dim)[..., dim:],
    "last dimension strided": lambda draw, heads, dim: draw(2, heads, 5, 2 * dim)[..., ::2],
    "expanded": lambda draw, heads, dim: draw(1, heads, 5, dim).expand(2, heads, 5, dim),
}


@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, batch: int, dtype: torch.dtype, device: str) -> None:
    """Of what comes in and of the gradients, and the layout of what goes out."""
    draw = drawing(dtype)
    q, k, (a, b) = HEADS[layout](draw, 7, 24), HEADS[layout](draw, 2, 24), weights(draw, 24)
    grads = HEADS["tokens first"](draw, 7, 24), HEADS[layout](draw, 2, 24)
    ours = assert_near((q, k, a, b), grads, *tables(batch, 5, 24, device, dtype))
    if layout not in ("last dimension strided", "expanded"):
        wanted = [torch.empty_like(x).stride() for x in (q, k)]
        assert [t.stride() for t in ours[:2]] == wanted == [t.stride() for t in ours[2:4]]


@pytest.mark.parametrize("q_heads, k_heads, dim", [(70, 65, 64), (9, 1, 80), (5, 3, 256)])
def test_more_heads_than_a_program_holds_at_once(
    q_heads: int, k_heads: int, dim: int, device: str
) -> None:
    draw = drawing(torch.float32)
    given = draw(1, q_heads, 3, dim), draw(1, k_heads, 3, dim), *weights(draw, dim)
    grads = draw(1, q_heads, 3, dim), draw(1, k_heads, 3, dim)
    assert_near(given, grads, *tables(1, 3, dim, device))


def test_more_tokens_than_programs(device: str) -> None:
    draw = drawing(torch.float32)
    given = draw(2, 2, 30, 8), draw(2, 1, 30, 8), *weights(draw, 8)
    assert_near(given, (draw(2, 2, 30, 8), draw(2, 1, 30, 8)), *tables(2, 30, 8, device))


@pytest.mark.parametrize("frozen", list(product((False, True), repeat=4)), ids=str)
def test_frozen_inputs(frozen: tuple[bool, ...], device: str) -> None:
    """A gradient is what it is whatever else has one; that of a frozen weight is not computed."""
    if all(frozen):
        pytest.skip("nothing to do")
    draw = drawing(torch.float32)
    given = draw(2, 3, 5, 8), draw(2, 2, 5, 8), *weights(draw, 8)
    grads, (cos, sin) = (draw(2, 3, 5, 8), draw(2, 2, 5, 8)), tables(1, 5, 8, device)
    full = with_gradients(in_one(cos, sin), given, *grads)[2:]
    leaves = [x.clone().requires_grad_(not off) for x, off in zip(given, frozen, strict=True)]
    results = in_one(cos, sin)(*leaves)
    made = [i for i, result in enumerate(results) if result.requires_grad]
    torch.autograd.backward([results[i] for i in made], [grads[i] for i in made])
    for leaf, grad in zip(leaves, full, strict=True):
        assert (leaf.grad is None) != leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, grad)
    if all(frozen[2:]):
        *_, dw = kernel._backward(*grads, *given, cos, sin, EPS, 0.0, *PLAIN.values(),
                                  torch.float32, torch.float32, False)  # fmt: skip
        assert dw.numel() == 0


def test_one_result_alone(device: str) -> None:
    draw = drawing(torch.float32)
    given = draw(2, 3, 5, 8), draw(2, 2, 5, 8), *weights(draw, 8)
    cos, sin = tables(1, 5, 8, device)
    leaves = [x.requires_grad_() for x in given]
    _, k = in_one(cos, sin)(*leaves)
    grad = draw(2, 2, 5, 8)
    found = torch.autograd.grad(k, leaves, grad)
    wanted = torch.autograd.grad(in_two(cos, sin)(*leaves)[1], leaves[1::2], grad)
    assert not found[0].any() and not found[2].any()
    assert max(map(relative_error, found[1::2], doubled(wanted))) < 1e-6


@pytest.mark.parametrize("norm_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16], ids=str)
def test_unlike_dtypes(
    norm_dtype: torch.dtype | None, out_dtype: torch.dtype | None, device: str
) -> None:
    """bfloat16 heads, float32 weights and tables: what is rounded in between, and at the end."""
    draw = drawing(torch.bfloat16)
    q, k, grads = draw(2, 3, 5, 8), draw(2, 1, 5, 8), (draw(2, 3, 5, 8), draw(2, 1, 5, 8))
    a, b = weights(drawing(torch.float32), 8)
    cos, sin = tables(1, 5, 8, device)

    def one(q: T, k: T, a: T, b: T) -> Any:
        return qk_norm_rope(q, k, a, b, cos, sin, EPS, norm_dtype=norm_dtype, out_dtype=out_dtype)

    def two(q: T, k: T, a: T, b: T) -> Any:
        q, k = rms_norm(q, a, EPS, 0.0, norm_dtype), rms_norm(k, b, EPS, 0.0, norm_dtype)
        return rope_pair(q, k, cos, sin, out_dtype=out_dtype)

    ours, theirs = (with_gradients(f, (q, k, a, b), *grads) for f in (one, two))
    exact = with_gradients(as_models_do(cos.double(), sin.double()), doubled((q, k, a, b)), *grads)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, true) <= 1.1 * relative_error(other, true) + FLOAT32_SLACK


def test_the_norm_is_rounded_before_the_turn(device: str) -> None:
    """By an angle of nothing, so that the results are the norms themselves."""
    draw = drawing(torch.bfloat16)
    x, w = draw(2, 3, 5, 16), draw(16)
    cos, sin = torch.ones(1, 5, 16, device=device), torch.zeros(1, 5, 16, device=device)
    (y,) = qk_norm_rope(x, None, w, None, cos, sin, EPS)
    assert y.dtype == torch.float32 and torch.equal(y, rms_norm(x, w, EPS).float())


def test_without_eps_no_row_is_infinite(device: str) -> None:
    """Three heads in a tile of four: what lies past the last adds nothing to the weight's."""
    draw = drawing(torch.float32)
    cos, sin = tables(1, 5, 8, device)
    given = draw(2, 3, 5, 8), draw(8)
    ours = with_gradients(
        lambda x, w: qk_norm_rope(x, None, w, None, cos, sin, 0.0), given, draw(2, 3, 5, 8)
    )
    assert all(t.isfinite().all() for t in ours)


def test_float64_is_computed_in_float64(device: str) -> None:
    draw = drawing(torch.float64)
    given = [t.requires_grad_() for t in (draw(1, 2, 3, 6), draw(1, 1, 3, 6), *weights(draw, 6))]
    cos, sin = tables(1, 3, 4, device, torch.float64)
    assert torch.autograd.gradcheck(in_one(cos, sin, 1.0), given)
    exact = with_gradients(as_models_do(cos, sin), given, draw(1, 2, 3, 6), draw(1, 1, 3, 6))
    assert relative_error(in_one(cos, sin)(*given)[0], exact[0]) < 1e-14


def test_heads_too_wide_for_a_program(device: str) -> None:
    dim, draw = MAX_WIDTH + 2, drawing(torch.float32)
    given = draw(1, 2, 3, dim), draw(1, 1, 3, dim), *weights(draw, dim)
    assert_near(given, (draw(1, 2, 3, dim), draw(1, 1, 3, dim)), *tables(1, 3, 8, device))


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8)])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    x, w, (cos, sin) = torch.randn(shape, device=device), torch.randn(8, device=device), tables(
        1, shape[2], 8, device
    )  # fmt: skip
    ours = with_gradients(in_one(cos, sin), (x, x, w, w), x, x)
    assert [t.shape for t in ours[:4]] == [shape] * 4
    assert all(torch.equal(t, torch.zeros_like(w)) for t in ours[4:])


def test_keeps_what_came_in_alone(device: str) -> None:
    draw = drawing(torch.float32)
    given = [draw(2, 3, 5, 8), draw(2, 1, 5, 8), *weights(draw, 8)]
    cos, sin = tables(1, 5, 8, device)
    kept: list[int] = []

    def keep(t: T) -> T:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        in_one(cos, sin)(*(t.requires_grad_() for t in given))
    assert kept == [t.data_ptr() for t in (*given, cos, sin)]


def test_one_launch_forward_and_two_backward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the layout of a projection, without a copy of it."""
    if not (INTERPRETED or device == "cuda"):
        pytest.skip("about the Triton kernels")
    draw, programs = drawing(torch.float32), list[int]()
    seen: list[int] = []
    real = kernel.launch

    def launch(what: Any, count: int, where: Any, *args: Any, **constants: Any) -> None:
        programs.append(count)
        seen.extend(t.data_ptr() for t in args if isinstance(t, torch.Tensor))
        real(what, count, where, *args, **constants)

    sums: list[torch.Size] = []
    real_sum = kernel.sum_of_rows
    monkeypatch.setattr(kernel, "launch", launch)
    monkeypatch.setattr(
        kernel, "sum_of_rows", lambda p, out: sums.append(out.shape) or real_sum(p, out)
    )
    q, k = (draw(2, 5, n, 8).transpose(1, 2).requires_grad_() for n in (3, 1))
    a, b = (w.requires_grad_() for w in weights(draw, 8))
    results = in_one(*tables(1, 5, 8, device))(q, k, a, b)
    assert programs == [10] and {q.data_ptr(), k.data_ptr()} <= set(seen)
    grads = [draw(2, 5, n, 8).transpose(1, 2) for n in (3, 1)]
    torch.autograd.backward(results, grads)
    assert len(programs) == 2 and sums == [(2, 8)]
    assert {t.data_ptr() for t in grads} <= set(seen)


def test_tables_that_learn(device: str) -> None:
    draw = drawing(torch.float32)
    q, k, (a, b) = draw(2, 3, 5, 8), draw(2, 1, 5, 8), weights(draw, 8)
    cos, sin = tables(1, 5, 8, device)
    results = []
    for function in (in_one, as_models_do):
        c, s = cos.clone().requires_grad_(), sin.clone().requires_grad_()
        y, z = function(c, s)(q, k, a, b)
        results.append(torch.autograd.grad(y.sin().sum() + z.cos().sum(), (c, s)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_itself_gives_tables_no_gradient(device: str) -> None:
    draw, (cos, sin) = drawing(torch.float32), tables(1, 5, 8, device)
    y, _ = torch.ops.liger_fx.qk_norm_rope(
        draw(2, 3, 5, 8), None, draw(8), None, cos.requires_grad_(), sin, EPS, 0.0,
        *PLAIN.values(), torch.float32, torch.float32,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="gives cos and sin no gradient"):
        y.sum().backward()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"k": None}, "come together"),
        ({"a": torch.randn(7)}, r"heads of 8 and a weight of \(7,\)"),
        ({"b": torch.randn(2, 8)}, r"heads of 8 and a weight of \(2, 8\)"),
        ({"k": torch.randn(2, 1, 5, 6), "b": torch.randn(6)}, "where those of q are 8"),
        ({"k": torch.randn(2, 1, 5, 8).half()}, "and k torch.float16 times torch.float32"),
        ({"b": torch.randn(8).half()}, "and k torch.float32 times torch.float16"),
        ({"q": torch.randn(2, 5, 8)}, r"not \(2, 5, 8\), \(1, 5, 8\)"),
        ({"cos": torch.randn(1, 5, 12), "sin": torch.randn(1, 5, 12)}, "cannot turn 12 elements"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    draw = torch.randn
    given: dict[str, Any] = {"q": draw(2, 3, 5, 8), "k": draw(2, 1, 5, 8), "a": draw(8)}
    given |= {"b": draw(8), "cos": draw(1, 5, 8), "sin": draw(1, 5, 8)} | changed
    q, k, a, b, cos, sin = given.values()
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(q, k, a, b, cos, sin, EPS)


@pytest.mark.skipif(not INTERPRETED, reason="about a Triton kernel on the CPU")
def test_batches_tokens_and_heads_beyond_32_bits(tmp_path: Path) -> None:
    x, (cos, sin), w = far_apart(tmp_path, 3, 8), tables(1, 3, 8, "cpu"), torch.randn(8)
    for view in (x[:, None, None], x[None, :, None], x[None, None]):
        place = (cos[:, : view.shape[2]], sin[:, : view.shape[2]])
        (y,) = qk_norm_rope(view, None, w, None, *place, EPS)
        wide = view.double(), view.double(), w.double(), w.double()
        exact, _ = as_models_do(place[0].double(), place[1].double())(*wide)
        assert relative_error(y, exact) < 4e-7
