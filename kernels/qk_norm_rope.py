"""RMSNorm of each head of q and k, and the rotary embedding of what it gives.

    q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps); q, k = rope_pair(q, k, cos, sin)
    ->  q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)       one launch, one pass

The norm is rounded to its dtype before it is turned, so that the results are those of the two
operators one after the other. The backward turns the gradient back, which gives dn, that of the
norm, and goes on as the norm's does: with r = rsqrt(mean(x^2) + eps), g = dn * (offset + weight)
and n the head's width,

    dx = r * (g - x * r^2 * sum(g * x) / n)      dweight = sum over tokens and heads of dn * x * r

It is one pass as well, with dn in registers, and needs what came in, nothing else.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from liger_fx.kernels.launch import (
    Launch,
    compute_dtype,
    launch,
    power_of_two,
    uses_triton,
)
from liger_fx.kernels.layout import empty_rows_like, with_unit_stride
from liger_fx.kernels.library import (
    define_op,
    differentiable,
    differentiate,
    gradients_of,
)
from liger_fx.kernels.norm import backward_programs, partial_sums, sum_of_rows
from liger_fx.kernels.replay import Replayed
from liger_fx.kernels.rms_norm import norm_backward, norm_forward, rms_norm_reference
from liger_fx.kernels.rope import (
    Form,
    check_tables,
    load_pairs,
    load_table,
    refuse_table_gradients,
    rope_forward,
    rope_launch,
    rope_reference,
    store_pairs,
    table_strides,
)

MAX_WIDTH = 1024  # a head is held in the registers of one program; wider ones take two operators
Maybe = torch.Tensor | None
Two = tuple[torch.Tensor, torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Options(NamedTuple):
    """What the operator is given besides tensors, in the order of its schema: see qk_norm_rope."""

    eps: float
    offset: float
    interleaved_in: bool
    interleaved_out: bool
    half_tables: bool
    norm_dtype: torch.dtype
    out_dtype: torch.dtype

    def form(self, transposed: bool = False) -> Form:
        return Form(*self[2:5], transposed)


def qk_norm_rope(
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    half_tables: bool = False,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """(rope(rms_norm(q, q_weight)), rope(rms_norm(k, k_weight))); without k the first alone.

    q, k: (batch, heads, tokens, D), any strides, of one dtype; the heads may differ in number.
    q_weight, k_weight: (D,), of one dtype. eps and offset are those of `rms_norm`, for both;
    cos, sin and how the pairs lie are those of `rope_pair`.
    norm_dtype: what the norm is rounded to, by default the dtype of q.
    Returns tensors of the same shapes and orders of dimensions in memory, in `out_dtype` (by
    default what norm * cos has); float64 is computed in float64, all else in float32.
    Gradients: those of q and k in their dtype; the weights' summed in float32, in an order that
    does not change from run to run. Second derivatives go through `qk_norm_rope_reference`. Where
    cos or sin require a gradient, PyTorch's own operations run. ValueError for other shapes or
    dtypes.
    """
    _check(q, k, q_weight, k_weight, cos, sin, half_tables)
    norm_dtype = norm_dtype or q.dtype
    out_dtype = out_dtype or torch.promote_types(norm_dtype, cos.dtype)
    options = Options(
        eps, offset, interleaved_in, interleaved_out, half_tables, norm_dtype, out_dtype
    )
    learnt = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    function = qk_norm_rope_reference if learnt else _qk_norm_rope
    found: tuple[torch.Tensor, ...] = function(q, k, q_weight, k_weight, cos, sin, *options)
    return found if k is not None else found[:1]


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
) -> Two:
    """What the operator computes, in PyTorch's own operations (the results' strides may differ).

    rest: the fields of `Options`. Without k the second result has no elements.
    """
    options = Options(*rest)
    found = [
        rope_reference(
            rms_norm_reference(x, weight, options.eps, options.offset, options.norm_dtype),
            cos, sin, options.form(), options.out_dtype,
        )
        for x, weight in _heads(q, k, q_weight, k_weight)
    ]  # fmt: skip
    return found[0], found[1] if k is not None else q.new_empty(0)


def _heads(
    q: torch.Tensor, k: Maybe, q_weight: torch.Tensor, k_weight: Maybe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield q, q_weight
    if k is not None and k_weight is not None:
        yield k, k_weight


def _check(
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    half_tables: bool,
) -> None:
    if (k is None) != (k_weight is None):
        raise ValueError("qk_norm_rope: k and k_weight come together")
    for x, weight in _heads(q, k, q_weight, k_weight):
        if weight.shape != x.shape[-1:] or weight.shape != q_weight.shape:
            raise ValueError(
                f"qk_norm_rope: heads of {x.shape[-1]} and a weight of {tuple(weight.shape)}, "
                f"where those of q are {q.shape[-1]} and {tuple(q_weight.shape)}"
            )
        if (x.dtype, weight.dtype) != (q.dtype, q_weight.dtype):
            raise ValueError(
                f"qk_norm_rope: q is {q.dtype} times {q_weight.dtype}, and k {x.dtype} times "
                f"{weight.dtype}"
            )
        check_tables(cos, sin, half_tables, x)


@triton.jit
def _load_weight(
    ptr, offset, DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What both ends of the pairs are multiplied by, (1, PAIRS), and the elements after them."""
    ptr = ptr + tl.zeros((1, 1), tl.int32)
    a, b = load_pairs(ptr, tl.full((1, 1), 1, tl.int1), HALF, PAIRS, INTERLEAVED)
    i = 2 * HALF + tl.arange(0, REST)[None, :]
    rest = tl.load(ptr + i, i < DIM, other=0.0).to(tl.float32)
    return a + offset, b + offset, rest + offset


@triton.jit
def _norm_and_turn(
    x_ptr, y_ptr, x_head, y_head, w_ptr, cos_a, cos_b, sin_a, sin_b, eps, offset,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, ROWS at a time; what lies beyond the pairs is normalised alone."""
    dtype = y_ptr.dtype.element_ty
    w_a, w_b, w_rest = _load_weight(w_ptr, offset, DIM, HALF, PAIRS, REST, IN)
    for start in range(0, HEADS, ROWS):
        head = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = head < HEADS
        x_ptrs, y_ptrs = x_ptr + head * x_head, y_ptr + head * y_head
        a, b = load_pairs(x_ptrs, mask, HALF, PAIRS, IN)
        squares = tl.sum(a * a + b * b, axis=1)
        if DIM > 2 * HALF:
            i = 2 * HALF + tl.arange(0, REST)[None, :]
            rest = tl.load(x_ptrs + i, mask & (i < DIM), other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1)
        r = tl.rsqrt(squares / DIM + eps)[:, None]
        a = (a * r * w_a).to(NORM).to(tl.float32)
        b = (b * r * w_b).to(NORM).to(tl.float32)
        new_a, new_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        store_pairs(y_ptrs, new_a.to(dtype), new_b.to(dtype), mask, HALF, PAIRS, OUT)
        if DIM > 2 * HALF:
            rest = (rest * r * w_rest).to(NORM).to(tl.float32)
            tl.store(y_ptrs + i, rest.to(dtype), mask & (i < DIM))


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q_ptr, k_ptr, new_q_ptr, new_k_ptr, q_w_ptr, k_w_ptr, cos_ptr, sin_ptr, tokens,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    new_q_batch, new_q_head, new_q_token, new_k_batch, new_k_head, new_k_token,
    cos_batch, cos_token, sin_batch, sin_token, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, SHORT: tl.constexpr, NORM: tl.constexpr,
    Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program a token: its cos and sin, then all heads of q, then those of k, if any."""
    token = (tl.program_id(0) % tokens).to(tl.int64)
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    cos_a, cos_b = load_table(cos_ptr, HALF, PAIRS, OUT, SHORT)
    sin_a, sin_b = load_table(sin_ptr, HALF, PAIRS, OUT, SHORT)
    q_ptr += batch * q_batch + token * q_token
    new_q_ptr += batch * new_q_batch + token * new_q_token
    _norm_and_turn(
        q_ptr, new_q_ptr, q_head, new_q_head, q_w_ptr, cos_a, cos_b, sin_a, sin_b, eps, offset,
        Q_HEADS, DIM, HALF, IN, OUT, NORM, Q_ROWS, PAIRS, REST,
    )  # fmt: skip
    if K_HEADS:
        k_ptr += batch * k_batch + token * k_token
        new_k_ptr += batch * new_k_batch + token * new_k_token
        _norm_and_turn(
            k_ptr, new_k_ptr, k_head, new_k_head, k_w_ptr, cos_a, cos_b, sin_a, sin_b, eps, offset,
            K_HEADS, DIM, HALF, IN, OUT, NORM, K_ROWS, PAIRS, REST,
        )  # fmt: skip


@triton.jit
def _back_through_both(
    dy_ptr, x_ptr, dx_ptr, dy_head, x_head, dx_head, w_a, w_b, w_rest, dw_a, dw_b, dw_rest,
    cos_a, cos_b, sin_a, sin_b, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """dx for all heads of one token, and what the weight's gradient is the sum of, added to dw."""
    dtype = dx_ptr.dtype.element_ty
    for start in range(0, HEADS, ROWS):
        head = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = head < HEADS
        dy_ptrs, x_ptrs = dy_ptr + head * dy_head, x_ptr + head * x_head
        dx_ptrs = dx_ptr + head * dx_head
        dy_a, dy_b = load_pairs(dy_ptrs, mask, HALF, PAIRS, OUT)
        a, b = load_pairs(x_ptrs, mask, HALF, PAIRS, IN)
        dn_a, dn_b = dy_a * cos_a + dy_b * sin_b, dy_b * cos_b - dy_a * sin_a
        g_a, g_b = dn_a * w_a, dn_b * w_b
        sums = tl.sum(tl.join(a * a + b * b, g_a * a + g_b * b), axis=1)  # one reduction
        if DIM > 2 * HALF:
            i = 2 * HALF + tl.arange(0, REST)[None, :]
            dn_rest = tl.load(dy_ptrs + i, mask & (i < DIM), other=0.0).to(tl.float32)
            rest = tl.load(x_ptrs + i, mask & (i < DIM), other=0.0).to(tl.float32)
            g_rest = dn_rest * w_rest
            sums += tl.sum(tl.join(rest * rest, g_rest * rest), axis=1)
        squares, products = tl.split(sums)
        # Rows past the last head are zeros, whose root may be infinite: they shall add nothing.
        r = tl.where(mask, tl.rsqrt(squares / DIM + eps)[:, None], 0.0)
        slope = r * r * (products / DIM)[:, None]
        dx_a, dx_b = r * (g_a - a * slope), r * (g_b - b * slope)
        store_pairs(dx_ptrs, dx_a.to(dtype), dx_b.to(dtype), mask, HALF, PAIRS, IN)
        if DIM > 2 * HALF:
            tl.store(dx_ptrs + i, (r * (g_rest - rest * slope)).to(dtype), mask & (i < DIM))
        if WEIGHT_GRAD:
            dw_a += dn_a * (a * r)
            dw_b += dn_b * (b * r)
            if DIM > 2 * HALF:
                dw_rest += dn_rest * (rest * r)
    return dw_a, dw_b, dw_rest


@triton.jit
def _store_partial(
    ptr, dw_a, dw_b, dw_rest, DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The sums over the heads, at one program's row."""
    ptr = ptr + tl.zeros((1, 1), tl.int32)
    a, b = tl.sum(dw_a, axis=0)[None, :], tl.sum(dw_b, axis=0)[None, :]
    store_pairs(ptr, a, b, tl.full((1, 1), 1, tl.int1), HALF, PAIRS, INTERLEAVED)
    if DIM > 2 * HALF:
        i = 2 * HALF + tl.arange(0, REST)[None, :]
        tl.store(ptr + i, tl.sum(dw_rest, axis=0)[None, :], i < DIM)


@triton.jit(do_not_specialize=["steps", "tokens"])
def _backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, new_q_ptr, new_k_ptr, q_w_ptr, k_w_ptr, cos_ptr, sin_ptr,
    tokens,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    new_q_batch, new_q_head, new_q_token, new_k_batch, new_k_head, new_k_token,
    cos_batch, cos_token, sin_batch, sin_token, eps, offset, partial_ptr, steps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, SHORT: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program takes every so many-th token. dq and dk are what comes in, new_q and new_k what
    goes out: the gradients of q and k."""
    q_a, q_b, q_rest = _load_weight(q_w_ptr, offset, DIM, HALF, PAIRS, REST, IN)
    q_sum_a = tl.zeros((Q_ROWS, PAIRS), tl.float32)
    q_sum_b = tl.zeros((Q_ROWS, PAIRS), tl.float32)
    q_sum_rest = tl.zeros((Q_ROWS, REST), tl.float32)
    if K_HEADS:
        k_a, k_b, k_rest = _load_weight(k_w_ptr, offset, DIM, HALF, PAIRS, REST, IN)
        k_sum_a = tl.zeros((K_ROWS, PAIRS), tl.float32)
        k_sum_b = tl.zeros((K_ROWS, PAIRS), tl.float32)
        k_sum_rest = tl.zeros((K_ROWS, REST), tl.float32)
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        token, batch = (step % tokens).to(tl.int64), (step // tokens).to(tl.int64)
        cos_at = cos_ptr + batch * cos_batch + token * cos_token
        sin_at = sin_ptr + batch * sin_batch + token * sin_token
        cos_a, cos_b = load_table(cos_at, HALF, PAIRS, OUT, SHORT)
        sin_a, sin_b = load_table(sin_at, HALF, PAIRS, OUT, SHORT)
        q_sum_a, q_sum_b, q_sum_rest = _back_through_both(
            dq_ptr + batch * dq_batch + token * dq_token,
            q_ptr + batch * q_batch + token * q_token,
            new_q_ptr + batch * new_q_batch + token * new_q_token,
            dq_head, q_head, new_q_head, q_a, q_b, q_rest, q_sum_a, q_sum_b, q_sum_rest,
            cos_a, cos_b, sin_a, sin_b, eps,
            Q_HEADS, DIM, HALF, IN, OUT, WEIGHT_GRAD, Q_ROWS, PAIRS, REST,
        )  # fmt: skip
        if K_HEADS:
            k_sum_a, k_sum_b, k_sum_rest = _back_through_both(
                dk_ptr + batch * dk_batch + token * dk_token,
                k_ptr + batch * k_batch + token * k_token,
                new_k_ptr + batch * new_k_batch + token * new_k_token,
                dk_head, k_head, new_k_head, k_a, k_b, k_rest, k_sum_a, k_sum_b, k_sum_rest,
                cos_a, cos_b, sin_a, sin_b, eps,
                K_HEADS, DIM, HALF, IN, OUT, WEIGHT_GRAD, K_ROWS, PAIRS, REST,
            )  # fmt: skip
    if WEIGHT_GRAD:
        partial_ptr += tl.program_id(0).to(tl.int64) * (DIM * (2 if K_HEADS else 1))
        _store_partial(partial_ptr, q_sum_a, q_sum_b, q_sum_rest, DIM, HALF, PAIRS, REST, IN)
        if K_HEADS:
            partial_ptr += DIM
            _store_partial(partial_ptr, k_sum_a, k_sum_b, k_sum_rest, DIM, HALF, PAIRS, REST, IN)


@lru_cache
def backward_launch(pairs: int) -> Launch:
    """A quarter of the forward's tile, because two tensors and the sums of a weight's gradient are
    in registers at once; four programs of 128 threads a multiprocessor, so that one loads while
    others compute: 71 microseconds for 8192 tokens of 16 + 8 heads of 128 on an H100, 85 with
    half a tile, 75 to 83 with other numbers of programs. `pairs` is a power of two."""
    rows, cols, warps, _, _ = rope_launch(pairs)
    return Launch(max(1, rows // 4), cols, warps, per_sm=4)


def _serves(*tensors: Maybe) -> bool:
    """Whether the kernels serve these, of which the first is q."""
    return uses_triton(*tensors) and tensors[0] is not None and tensors[0].shape[-1] <= MAX_WIDTH


def _launch(
    kernel: Any,
    programs: int,
    tile: Launch,
    heads: list[tuple[torch.Tensor, Maybe]],
    weights: tuple[torch.Tensor, Maybe],
    tables: Two,
    options: Options,
    *more: Any,
    **constants: Any,
) -> None:
    """heads: tensors of q's shape, each with its counterpart of k's, if there is a k."""
    q, k = heads[0]
    flat = [x if x is not None else pair[0] for pair in heads for x in pair]
    tables = tuple(map(with_unit_stride, tables))  # type: ignore[assignment]
    k_heads, dim = 0 if k is None else k.shape[1], q.shape[3]
    half = tables[0].shape[-1] // (1 if options.half_tables else 2)
    launch(
        kernel, programs, q.device,
        *flat, *(w if w is None else w.contiguous() for w in weights), *tables, q.shape[2],
        *(stride for x in flat for stride in x.stride()[:3]),
        *(stride for table in tables for stride in table_strides(table)),
        options.eps, options.offset, *more,
        Q_HEADS=q.shape[1], K_HEADS=k_heads, DIM=dim, HALF=half,
        IN=options.interleaved_in, OUT=options.interleaved_out, SHORT=options.half_tables,
        Q_ROWS=min(power_of_two(q.shape[1]), tile.rows),
        K_ROWS=min(power_of_two(k_heads), tile.rows),
        PAIRS=tile.cols, REST=power_of_two(dim - 2 * half), num_warps=tile.warps, **constants,
    )  # fmt: skip


def _pairs(cos: torch.Tensor, options: Options) -> int:
    return power_of_two(cos.shape[-1] // (1 if options.half_tables else 2))


def _forward(
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
) -> Two:
    options = Options(*rest)
    if not _serves(q, k, q_weight, k_weight, cos, sin):
        normed = tuple(
            norm_forward(x, weight, options.eps, options.offset, options.norm_dtype)
            for x, weight in _heads(q, k, q_weight, k_weight)
        )
        dtypes = (options.out_dtype,) * len(normed)
        found = rope_forward(normed, cos, sin, options.form(), dtypes)
        return found[0], found[1] if k is not None else q.new_empty(0)
    new_q, new_k = _fake(q, k, q_weight, k_weight, cos, sin, *rest)
    if programs := q.shape[0] * q.shape[2]:
        given = with_unit_stride(q), None if k is None else with_unit_stride(k)
        _launch(
            _forward_kernel, programs, rope_launch(_pairs(cos, options)),
            [given, (new_q, None if k is None else new_k)], (q_weight, k_weight), (cos, sin),
            options, NORM=getattr(tl, str(options.norm_dtype).removeprefix("torch.")),
        )  # fmt: skip
    return new_q, new_k


def _fake(
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
) -> Two:
    dtype = Options(*rest).out_dtype
    return empty_rows_like(q, dtype), q.new_empty(0) if k is None else empty_rows_like(k, dtype)


def _backward(
    dq: torch.Tensor,
    dk: Maybe,
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
) -> Three:
    """The gradients of q and k, and those of the weights as rows of one matrix, which is of no
    elements unless the last of `rest` asks for them."""
    options, weight_grad = Options(*rest[:-1]), rest[-1]
    new_q, new_k, dw = _backward_fake(dq, dk, q, k, q_weight, k_weight, cos, sin, *rest)
    if not _serves(q, k, q_weight, k_weight, cos, sin, dq, dk):
        given = (dq,) if dk is None else (dq, dk)
        dtypes = (compute_dtype(q, q_weight, cos),) * len(given)
        back = rope_forward(given, cos, sin, options.form(transposed=True), dtypes)
        found = [
            norm_backward(dn, x, weight, options.eps, options.offset, weight_grad)
            for dn, (x, weight) in zip(back, _heads(q, k, q_weight, k_weight), strict=True)
        ]
        new_k = new_k if k is None else found[1][0]
        return found[0][0], new_k, torch.stack([dw for _, dw in found]) if weight_grad else dw
    steps = q.shape[0] * q.shape[2]
    if not steps:
        return new_q, new_k, dw.zero_()
    tile = backward_launch(_pairs(cos, options))
    programs = backward_programs(steps, tile, q.device)
    partial = partial_sums(dw, programs) if weight_grad else None
    heads = [(dq, dk), (q, k), (new_q, None if k is None else new_k)]
    _launch(
        _backward_kernel, programs, tile,
        [(with_unit_stride(x), None if y is None else with_unit_stride(y)) for x, y in heads],
        (q_weight, k_weight), (cos, sin), options, partial, steps, WEIGHT_GRAD=weight_grad,
    )  # fmt: skip
    if partial is not None and partial is not dw:
        sum_of_rows(partial, dw)
    return new_q, new_k, dw


def _backward_fake(
    dq: torch.Tensor,
    dk: Maybe,
    q: torch.Tensor,
    k: Maybe,
    q_weight: torch.Tensor,
    k_weight: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
) -> Three:
    shape = (1 if k is None else 2, q.shape[-1]) if rest[-1] else (0,)
    new_k = q.new_empty(0) if k is None else empty_rows_like(k)
    return empty_rows_like(q), new_k, q_weight.new_empty(shape)


_OPTIONS = (
    "float eps, float offset, bool interleaved_in, bool interleaved_out, bool half_tables,"
    " ScalarType norm_dtype, ScalarType out_dtype"
)
_GIVEN = "Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, Tensor cos, Tensor sin"
_qk_norm_rope = define_op(
    f"qk_norm_rope({_GIVEN}, {_OPTIONS}) -> (Tensor, Tensor)", Replayed(_forward), _fake
)
_qk_norm_rope_backward = define_op(
    f"qk_norm_rope_backward(Tensor dq, Tensor? dk, {_GIVEN}, {_OPTIONS}, bool weight_grad)"
    " -> (Tensor, Tensor, Tensor)",
    Replayed(_backward),
    _backward_fake,
)


def _again(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Maybe, ...]:
    def plain(*tensors: Any) -> Two:
        return qk_norm_rope_reference(*tensors, *ctx.options)

    wanted = ctx.needs_input_grad[:6]
    refuse_table_gradients(*wanted[4:])
    saved = ctx.saved_tensors
    given = dq, None if saved[1] is None else dk
    return *gradients_of(plain, saved, given, wanted), *(None,) * 8


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Two:
        *given, compute = args
        ctx.save_for_backward(*given[:6])
        ctx.options = given[6:]
        found: Two = compute(*given)
        return found

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Maybe, ...]:
        refuse_table_gradients(*ctx.needs_input_grad[4:6])
        saved = ctx.saved_tensors  # once: a checkpoint computes the layer again for it
        has_k, wanted = saved[1] is not None, ctx.needs_input_grad[2:4]
        new_q, new_k, dw = _qk_norm_rope_backward(
            dq, dk if has_k else None, *saved, *ctx.options, any(wanted)
        )
        weights = [dw[i] if asked else None for i, asked in enumerate(wanted)]
        return new_q, new_k if has_k else None, *weights, *(None,) * 10


differentiate(_qk_norm_rope, _QKNormRope, qk_norm_rope_reference)
