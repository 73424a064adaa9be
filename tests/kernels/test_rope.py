"""The rotary embedding against a turn of complex numbers, and against the models' own spellings."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.rope import Form, rope, rope_pair, rope_reference
from tests.kernels.accuracy import (
    DTYPES,
    Draw,
    assert_as_accurate,
    doubled,
    drawing,
    far_apart,
    relative_error,
    with_gradients,
)

FORMS = [
    {"interleaved_in": a, "interleaved_out": b, "half_tables": c}
    for a, b, c in product((False, True), repeat=3)
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda f: "".join("ny"[v] for v in f.values()))


def positions(width: int, interleaved: bool) -> tuple[list[int], list[int]]:
    """Where the first and the second ends of the pairs of a head lie."""
    half = width // 2
    if interleaved:
        return list(range(0, width, 2)), list(range(1, width, 2))
    return list(range(half)), list(range(half, width))


def textbook(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved_in: bool,
    interleaved_out: bool,
    half_tables: bool,
) -> torch.Tensor:
    """By matrix: every output element is a sum of two input elements times its own cos and sin."""
    width = cos.shape[-1] * (2 if half_tables else 1)
    first_in, second_in = positions(width, interleaved_in)
    first_out, second_out = positions(width, interleaved_out)
    direct, crossed = torch.zeros(2, width, width, dtype=x.dtype, device=x.device)
    spread = torch.zeros(cos.shape[-1], width, dtype=x.dtype, device=x.device)
    for pair in range(width // 2):
        direct[first_in[pair], first_out[pair]] = direct[second_in[pair], second_out[pair]] = 1
        crossed[second_in[pair], first_out[pair]] = -1
        crossed[first_in[pair], second_out[pair]] = 1
        for end in (first_out[pair], second_out[pair]):
            spread[pair if half_tables else end, end] = 1
    cos, sin = ((table.to(x.dtype) @ spread).unsqueeze(1) for table in (cos, sin))
    turned = x[..., :width] @ direct * cos + x[..., :width] @ crossed * sin
    return torch.cat((turned, x[..., width:]), dim=-1)


def llama(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = q.shape[-1] // 2
    rotated = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
    return q * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def tables(
    batch: int, tokens: int, width: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Their halves unlike on purpose: a kernel that reads one half for both must fail."""
    cos, sin = torch.randn(2, batch, tokens, width, device=device).to(dtype)
    return cos, sin


HEADS: dict[str, Callable[[Draw, int, int], torch.Tensor]] = {
    "heads first": lambda draw, heads, dim: draw(2, heads, 5, dim),
    "tokens first": lambda draw, heads, dim: draw(2, 5, heads, dim).transpose(1, 2),
    "part of a packed projection": lambda draw, heads, dim: draw(2, 5, heads + 4, dim)[
        :, :, 2:-2
    ].transpose(1, 2),
    "part of a head": lambda draw, heads, dim: draw(2, heads, 5, 2 * dim)[..., dim:],
    "last dimension strided": lambda draw, heads, dim: draw(2, heads, 5, 2 * dim)[..., ::2],
}


@forms
@pytest.mark.parametrize("width, dim", [(8, 8), (6, 10)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form(
    form: dict[str, Any], width: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    q = torch.randn(2, 3, 5, dim, device=device).to(dtype)
    k = torch.randn(2, 1, 5, dim, device=device).to(dtype)
    cos, sin = tables(2, 5, width // 2 if form["half_tables"] else width, device, dtype)
    grads = (torch.randn_like(q), torch.randn_like(k))

    def ours(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_pair(q, k, cos, sin, **form)

    def by_matrix(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return textbook(q, cos, sin, **form), textbook(k, cos, sin, **form)

    exact = with_gradients(by_matrix, doubled((q, k)), *grads)
    eager = with_gradients(by_matrix, (q, k), *grads)
    values = with_gradients(ours, (q, k), *grads)
    assert [t.dtype for t in values] == [dtype] * 4
    assert_as_accurate(values, eager, exact)
    for x, grad, place in ((q, grads[0], 0), (k, grads[1], 1))[: 2 if dtype.itemsize == 4 else 0]:
        alone = with_gradients(lambda x: rope(x, cos, sin, **form), (x,), grad)
        assert torch.equal(alone[0], values[place])
        assert torch.equal(alone[1], values[place + 2])


@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, batch: int, dtype: torch.dtype, device: str) -> None:
    draw = drawing(dtype)
    q, k = HEADS[layout](draw, 7, 12), HEADS[layout](draw, 2, 12)
    cos, sin = tables(batch, 5, 12, device, dtype)
    grads = (draw(2, 5, 7, 12).transpose(1, 2), torch.randn_like(k))
    exact = with_gradients(
        lambda q, k: (llama(q, cos.double(), sin.double()), llama(k, cos.double(), sin.double())),
        doubled((q, k)),
        *grads,
    )
    ours = with_gradients(lambda q, k: rope_pair(q, k, cos, sin), (q, k), *grads)
    assert_as_accurate(ours, exact, exact)
    if layout != "last dimension strided":
        assert [t.stride() for t in ours[:2]] == [torch.empty_like(t).stride() for t in (q, k)]


def test_tables_that_are_part_of_others(device: str) -> None:
    """As models hand them in that keep every angle twice and read the first half."""
    x = torch.randn(2, 3, 5, 8, device=device)
    cos, sin = tables(2, 5, 16, device)
    for part in (slice(0, 8), slice(3, 11), slice(0, 16, 2)):
        y = rope(x, cos[..., part], sin[..., part])
        assert relative_error(y, llama(*doubled((x, cos[..., part], sin[..., part])))) < 2e-7


def test_more_heads_than_a_program_holds_at_once(device: str) -> None:
    q, k = torch.randn(1, 70, 2, 64, device=device), torch.randn(1, 65, 2, 64, device=device)
    cos, sin = tables(1, 2, 64, device)
    for x, y in zip((q, k), rope_pair(q, k, cos, sin), strict=True):
        assert relative_error(y, llama(*doubled((x, cos, sin)))) < 2e-7


def test_as_complex_numbers(device: str) -> None:
    """Interleaved with half tables is one complex product."""
    x, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(1, 5, 4, device)
    turned = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.complex(cos, sin)
    y = rope(x, cos, sin, interleaved_in=True, interleaved_out=True, half_tables=True)
    assert relative_error(y, torch.view_as_real(turned).flatten(-2)) < 2e-7


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16], ids=str)
def test_half_input_and_float32_tables(out_dtype: torch.dtype | None, device: str) -> None:
    q = torch.randn(2, 3, 5, 8, device=device, dtype=torch.bfloat16)
    cos, sin = tables(1, 5, 8, device)
    grad = torch.randn(q.shape, device=device, dtype=torch.bfloat16)
    ours = with_gradients(lambda q: rope(q, cos, sin, out_dtype=out_dtype), (q,), grad)
    exact = with_gradients(lambda q: llama(q, cos.double(), sin.double()), doubled((q,)), grad)
    assert [t.dtype for t in ours] == [out_dtype or torch.float32, torch.bfloat16]
    assert_as_accurate(ours, exact, exact)


@forms
def test_float64_is_computed_in_float64(form: dict[str, Any], device: str) -> None:
    x, grad = torch.randn(2, 2, 3, 5, 12, device=device, dtype=torch.float64)
    cos, sin = tables(1, 5, 5 if form["half_tables"] else 10, device, torch.float64)
    exact = with_gradients(lambda x: textbook(x, cos, sin, **form), (x,), grad)
    for function in (
        lambda x: rope(x, cos, sin, **form),
        lambda x: rope_reference(x, cos, sin, Form(**form)),
    ):
        ours = with_gradients(function, (x,), grad)
        assert max(map(relative_error, ours, exact)) < 1e-14


def test_tables_that_learn(device: str) -> None:
    q, k = torch.randn(2, 2, 3, 5, 8, device=device)
    cos, sin = tables(1, 5, 8, device)
    ours = with_gradients(
        lambda q, k, cos, sin: rope_pair(q, k, cos, sin), (q, k, cos, sin), q.cos(), k.cos()
    )
    exact = with_gradients(
        lambda q, k, cos, sin: (llama(q, cos, sin), llama(k, cos, sin)),
        doubled((q, k, cos, sin)),
        q.cos(),
        k.cos(),
    )
    assert max(map(relative_error, ours, exact)) < 5e-7
    alone = with_gradients(rope, (q, cos, sin), q.cos())
    assert relative_error(alone[0], exact[0]) < 2e-7


def test_the_operator_itself_gives_tables_no_gradient(device: str) -> None:
    q, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(1, 5, 8, device)
    y = torch.ops.liger_fx.rope(q, cos.requires_grad_(), sin, False, False, False, False, None)
    with pytest.raises(RuntimeError, match="gives cos and sin no gradient"):
        y.sum().backward()


def test_second_derivative(device: str) -> None:
    """The turn is linear: its derivative does not depend on x, and can be differentiated."""
    x = torch.randn(1, 2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(1, 3, 4, device, torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin).square(), (x,))


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8)])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    q, (cos, sin) = torch.randn(shape, device=device), tables(1, shape[2], 8, device)
    for out in with_gradients(lambda q, k: rope_pair(q, k, cos, sin), (q, q), q, q):
        assert out.shape == shape


def test_keeps_the_tables_alone(device: str) -> None:
    q, (cos, sin) = torch.randn(2, 3, 5, 8, device=device), tables(1, 5, 8, device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope_pair(q.requires_grad_(), q, cos, sin)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize(
    "x, table, half_tables, message",
    [
        ((2, 5, 8), (1, 5, 8), False, r"not \(2, 5, 8\), \(1, 5, 8\)"),
        ((2, 3, 5, 8), (5, 8), False, r"not \(2, 3, 5, 8\), \(5, 8\)"),
        ((2, 3, 5, 8), (3, 5, 8), False, "is not made for x"),
        ((2, 3, 5, 8), (1, 4, 8), False, "is not made for x"),
        ((2, 3, 5, 8), (1, 5, 8), True, "cannot turn 16 elements in pairs of heads of 8"),
        ((2, 3, 5, 8), (1, 5, 7), False, "cannot turn 7 elements"),
    ],
)
def test_what_is_refused(
    x: tuple[int, ...], table: tuple[int, ...], half_tables: bool, message: str
) -> None:
    q, t = torch.randn(x), torch.randn(table)
    with pytest.raises(ValueError, match=message):
        rope_pair(q, q, t, t, half_tables=half_tables)
    with pytest.raises(ValueError, match=message):
        rope(q, t, t, half_tables=half_tables)


@pytest.mark.skipif(not INTERPRETED, reason="about a Triton kernel on the CPU")
def test_batches_tokens_and_heads_beyond_32_bits(tmp_path: Path) -> None:
    x, (cos, sin) = far_apart(tmp_path, 3, 8), tables(1, 3, 8, "cpu")
    for view in (x[:, None, None], x[None, :, None], x[None, None]):
        place = (cos[:, : view.shape[2]], sin[:, : view.shape[2]])
        y = rope(view, *place)
        assert relative_error(y, llama(*doubled((view, *place)))) < 2e-7
