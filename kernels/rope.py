"""Rotary position embedding: pairs of a head's elements turned by angles that grow with position.

    q * cos.unsqueeze(1) + rotate_half(q) * sin.unsqueeze(1), and the same for k
    ->  q, k = rope_pair(q, k, cos, sin)          one launch, cos and sin read once a token

Su et al., "RoFormer", 2021. A pair (a, b) turns by cos and sin, which may differ for its two ends:

    a' = a * cos[a] - b * sin[a]         b' = b * cos[b] + a * sin[b]
    da = da' * cos[a] + db' * sin[b]     db = db' * cos[b] - da' * sin[a]

The derivative is the same turn with other sines: one operator serves as its own backward.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from liger_fx.kernels.compile_ahead import refuse_ahead
from liger_fx.kernels.launch import Launch, compute_dtype, launch, power_of_two, uses_triton
from liger_fx.kernels.layout import as_wide, empty_rows_like, laid_out, with_unit_stride
from liger_fx.kernels.library import define_op, differentiate
from liger_fx.kernels.replay import Replayed

Pair = tuple[torch.Tensor, torch.Tensor]


class Form(NamedTuple):
    """How the pairs of a head lie. Pair j of R / 2 is elements (j, j + R / 2), "half-split", or
    (2 * j, 2 * j + 1), "interleaved".

    half_tables: cos and sin hold R / 2 entries, one a pair; else R, laid out as the output is.
    transposed: turn back, as the backward does; in and out still name those of the forward.
    """

    interleaved_in: bool = False
    interleaved_out: bool = False
    half_tables: bool = False
    transposed: bool = False


def rope_pair(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    half_tables: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Pair:
    """q and k with the first R elements of each head turned, in float32 and rounded once.

    q, k: (batch, heads, tokens, D), any strides; the heads may differ in number.
    cos, sin: (1 or batch, tokens, R), R <= D and even, laid out as the output is and read in full;
    with `half_tables` (1 or batch, tokens, R / 2), one entry for both ends of a pair.
    Elements from R on pass through. Returns tensors of the same shapes and orders of dimensions in
    memory, in `out_dtype` (by default what x * cos has); float64 is computed in float64.
    Where cos or sin require a gradient, PyTorch's own operations run. ValueError for other shapes.
    """
    check_tables(cos, sin, half_tables, q, k)
    form = (interleaved_in, interleaved_out, half_tables, False)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        form = Form(*form)
        return (
            rope_reference(q, cos, sin, form, out_dtype),
            rope_reference(k, cos, sin, form, out_dtype),
        )
    return _rope_pair(q, k, cos, sin, *form, out_dtype, out_dtype)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    half_tables: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What `rope_pair` does, to one tensor."""
    check_tables(cos, sin, half_tables, x)
    form = Form(interleaved_in, interleaved_out, half_tables)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return rope_reference(x, cos, sin, form, out_dtype)
    return _rope(x, cos, sin, *form, out_dtype)


def rope_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    form: Form,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What `rope` computes, in PyTorch's own operations (the result's strides may differ)."""
    dtype = compute_dtype(x, cos, sin)
    out_dtype = out_dtype or torch.promote_types(x.dtype, cos.dtype)
    width = cos.shape[-1] * (2 if form.half_tables else 1)
    (cos_a, cos_b), (sin_a, sin_b) = (_ends(t.to(dtype).unsqueeze(1), form) for t in (cos, sin))
    interleaved_in, interleaved_out = form.interleaved_in, form.interleaved_out
    if form.transposed:
        sin_a, sin_b = -sin_b, -sin_a
        interleaved_in, interleaved_out = interleaved_out, interleaved_in
    a, b = _split(x[..., :width].to(dtype), interleaved_in)
    turned = _join(a * cos_a - b * sin_a, b * cos_b + a * sin_b, interleaved_out)
    return torch.cat([turned.to(out_dtype), x[..., width:].to(out_dtype)], dim=-1)


def _split(x: torch.Tensor, interleaved: bool) -> Pair:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _join(a: torch.Tensor, b: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)


def _ends(table: torch.Tensor, form: Form) -> Pair:
    return (table, table) if form.half_tables else _split(table, form.interleaved_out)


def check_tables(
    cos: torch.Tensor, sin: torch.Tensor, half_tables: bool, *xs: torch.Tensor
) -> None:
    table = cos.shape
    are_tables = len(table) == 3 and table == sin.shape
    for x in xs:
        shape = x.shape
        if len(shape) != 4 or not are_tables:
            raise ValueError(
                "rope: wants x of (batch, heads, tokens, D) and cos and sin of one shape (1 or "
                f"batch, tokens, R), not {tuple(shape)}, {tuple(table)} and {tuple(sin.shape)}"
            )
        batch, tokens, width = table
        width *= 2 if half_tables else 1
        if (batch != 1 and batch != shape[0]) or tokens != shape[2]:
            raise ValueError(f"rope: cos {tuple(table)} is not made for x {tuple(shape)}")
        if width > shape[3] or width % 2:
            raise ValueError(f"rope: cannot turn {width} elements in pairs of heads of {shape[3]}")


@triton.jit
def load_pairs(ptr, mask, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both ends, float32 (rows, PAIRS), of the first HALF pairs at each of (rows, 1) pointers."""
    if INTERLEAVED:
        i = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(ptr + i, mask & (i < 2 * HALF), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(both, (ptr.shape[0], PAIRS, 2)))
    else:
        j = tl.arange(0, PAIRS)[None, :]
        a = tl.load(ptr + j, mask & (j < HALF), other=0.0).to(tl.float32)
        b = tl.load(ptr + HALF + j, mask & (j < HALF), other=0.0).to(tl.float32)
        return a, b


@triton.jit
def store_pairs(
    ptr, a, b, mask, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """The inverse of `load_pairs`: a and b in the dtype that ptr points to."""
    if INTERLEAVED:
        i = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(a, b), (ptr.shape[0], 2 * PAIRS))
        tl.store(ptr + i, both, mask & (i < 2 * HALF))
    else:
        j = tl.arange(0, PAIRS)[None, :]
        tl.store(ptr + j, a, mask & (j < HALF))
        tl.store(ptr + HALF + j, b, mask & (j < HALF))


@triton.jit
def load_table(
    ptr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SHORT: tl.constexpr
):  # fmt: skip
    """The entries (1, PAIRS) of cos or sin for both ends of a token's pairs."""
    ptr = ptr + tl.zeros((1, 1), tl.int32)
    mask = tl.full((1, 1), 1, tl.int1)
    if SHORT:
        j = tl.arange(0, PAIRS)[None, :]
        entries = tl.load(ptr + j, mask & (j < HALF), other=0.0).to(tl.float32)
        return entries, entries
    else:
        return load_pairs(ptr, mask, HALF, PAIRS, INTERLEAVED)


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, x_head, y_head, cos_a, cos_b, sin_a, sin_b,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token, ROWS at a time; copy the REST elements after the pairs."""
    dtype = y_ptr.dtype.element_ty
    for start in range(0, HEADS, ROWS):
        head = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = head < HEADS
        x_ptrs, y_ptrs = x_ptr + head * x_head, y_ptr + head * y_head
        a, b = load_pairs(x_ptrs, mask, HALF, PAIRS, IN)
        new_a = (a * cos_a - b * sin_a).to(dtype)
        new_b = (b * cos_b + a * sin_b).to(dtype)
        store_pairs(y_ptrs, new_a, new_b, mask, HALF, PAIRS, OUT)
        if REST:
            i = 2 * HALF + tl.arange(0, REST)[None, :]
            rest = tl.load(x_ptrs + i, mask & (i < DIM), other=0.0)
            tl.store(y_ptrs + i, rest.to(tl.float32).to(dtype), mask & (i < DIM))


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    q_ptr, k_ptr, new_q_ptr, new_k_ptr, cos_ptr, sin_ptr, tokens,
    q_batch, q_head, q_token, new_q_batch, new_q_head, new_q_token,
    k_batch, k_head, k_token, new_k_batch, new_k_head, new_k_token,
    cos_batch, cos_token, sin_batch, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_DIM: tl.constexpr, K_DIM: tl.constexpr,
    HALF: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TABLE: tl.constexpr,
    SHORT: tl.constexpr, TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr,
    Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, Q_REST: tl.constexpr, K_REST: tl.constexpr,
):  # fmt: skip
    """One program a token: its cos and sin, then all heads of q, then those of k, if any."""
    token = (tl.program_id(0) % tokens).to(tl.int64)
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    cos_a, cos_b = load_table(cos_ptr, HALF, PAIRS, TABLE, SHORT)
    sin_a, sin_b = load_table(sin_ptr, HALF, PAIRS, TABLE, SHORT)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    q_ptr += batch * q_batch + token * q_token
    new_q_ptr += batch * new_q_batch + token * new_q_token
    _turn_heads(
        q_ptr, new_q_ptr, q_head, new_q_head, cos_a, cos_b, sin_a, sin_b,
        Q_HEADS, Q_DIM, HALF, IN, OUT, Q_ROWS, PAIRS, Q_REST,
    )  # fmt: skip
    if K_HEADS:
        k_ptr += batch * k_batch + token * k_token
        new_k_ptr += batch * new_k_batch + token * new_k_token
        _turn_heads(
            k_ptr, new_k_ptr, k_head, new_k_head, cos_a, cos_b, sin_a, sin_b,
            K_HEADS, K_DIM, HALF, IN, OUT, K_ROWS, PAIRS, K_REST,
        )  # fmt: skip


@lru_cache
def rope_launch(pairs: int) -> Launch:
    """Up to 4096 elements of one token's heads at once; `pairs` is a power of two."""
    return Launch(rows=max(1, 2048 // pairs), cols=pairs, warps=4)


def rope_forward(
    tensors: tuple[torch.Tensor, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    form: Form,
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[torch.Tensor, ...]:
    """One or two tensors turned, in x's order of dimensions in memory."""
    if not uses_triton(*tensors, cos, sin):
        return _by_pytorch(tensors, cos, sin, form, dtypes)
    outs = tuple(_fake(x, cos, dtype) for x, dtype in zip(tensors, dtypes, strict=True))
    batch, _, tokens, _ = outs[0].shape
    if batch * tokens:
        tensors = tuple(map(with_unit_stride, tensors))
        _launch(tensors, outs, with_unit_stride(cos), with_unit_stride(sin), form)
    return outs


def _by_pytorch(
    tensors: tuple[torch.Tensor, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    form: tuple[bool, bool, bool, bool],
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[torch.Tensor, ...]:
    """The common form in fewer steps: (a, b) * cos + (b, a) * (-sin_a, sin_b); the turn back has
    (sin_b, -sin_a) there."""
    q, k, width = tensors[0], tensors[-1], cos.size(-1)
    if form[:3] != _COMMON or not q.size(-1) == width == k.size(-1):
        return tuple(
            laid_out(rope_reference(x, cos, sin, Form(*form), dtype), x)
            for x, dtype in zip(tensors, dtypes, strict=True)
        )
    dtype, half = compute_dtype(q, k, cos, sin), width // 2
    signed = as_wide(sin, dtype) * _signs(half, dtype, sin.device)
    if form[3]:
        signed = signed.roll(half, -1)
    wide_cos = as_wide(cos, dtype)
    if cos.size(0) > 1:  # else (1, tokens, R) is spread over heads and batch as it is
        wide_cos, signed = wide_cos.unsqueeze(1), signed.unsqueeze(1)
    outs = []
    for x, out_dtype in zip(tensors, dtypes, strict=True):
        wide = as_wide(x, dtype)
        y = (wide * wide_cos).addcmul_(wide.roll(half, -1), signed)
        out_dtype = out_dtype or torch.promote_types(x.dtype, cos.dtype)
        outs.append(laid_out(as_wide(y, out_dtype), x))
    return tuple(outs)


_COMMON = False, False, False


@lru_cache
def _signs(half: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """-1 for the first half of a head, 1 for the second. (A product with them is one operation;
    to negate the first half of a copy takes three.)"""
    refuse_ahead()
    with torch.inference_mode(False):
        return torch.tensor([-1.0] * half + [1.0] * half, dtype=dtype, device=device)


def _launch(
    tensors: tuple[torch.Tensor, ...],
    outs: tuple[torch.Tensor, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    form: Form,
) -> None:
    q, k, new_q, new_k = tensors[0], tensors[-1], outs[0], outs[-1]
    batch, q_heads, tokens, q_dim = q.shape
    k_heads, k_dim = (k.shape[1], k.shape[3]) if len(tensors) == 2 else (0, 0)
    half = cos.shape[-1] // (1 if form.half_tables else 2)
    tile = rope_launch(power_of_two(half))
    source, target = form.interleaved_in, form.interleaved_out
    launch(
        _kernel, batch * tokens, q.device, q, k, new_q, new_k, cos, sin, tokens,
        *q.stride()[:3], *new_q.stride()[:3], *k.stride()[:3], *new_k.stride()[:3],
        *table_strides(cos), *table_strides(sin),
        Q_HEADS=q_heads, K_HEADS=k_heads, Q_DIM=q_dim, K_DIM=k_dim, HALF=half,
        IN=target if form.transposed else source, OUT=source if form.transposed else target,
        TABLE=target, SHORT=form.half_tables, TRANSPOSED=form.transposed, PAIRS=tile.cols,
        Q_ROWS=min(power_of_two(q_heads), tile.rows), K_ROWS=min(power_of_two(k_heads), tile.rows),
        Q_REST=_rest(q_dim, half), K_REST=_rest(k_dim, half), num_warps=tile.warps,
    )  # fmt: skip


def table_strides(table: torch.Tensor) -> tuple[int, int]:
    """Those of batch and tokens; a table that all batches share has the first of 0."""
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)


def _rest(dim: int, half: int) -> int:
    """The tile for what lies beyond the pairs, 0 where there is nothing."""
    return power_of_two(dim - 2 * half) if dim > 2 * half else 0


def _fake(x: torch.Tensor, cos: torch.Tensor, out_dtype: torch.dtype | None) -> torch.Tensor:
    return empty_rows_like(x, out_dtype or torch.promote_types(x.dtype, cos.dtype))


_FORM = "bool interleaved_in, bool interleaved_out, bool half_tables, bool transposed"
_rope = define_op(
    f"rope(Tensor x, Tensor cos, Tensor sin, {_FORM}, ScalarType? out_dtype) -> Tensor",
    Replayed(lambda x, cos, sin, *rest: rope_forward((x,), cos, sin, Form(*rest[:4]), rest[4:])[0]),
    lambda x, cos, sin, *rest: _fake(x, cos, rest[4]),
)
_rope_pair = define_op(
    f"rope_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, {_FORM}, ScalarType? q_dtype,"
    " ScalarType? k_dtype) -> (Tensor, Tensor)",
    Replayed(
        lambda q, k, cos, sin, *rest: rope_forward((q, k), cos, sin, Form(*rest[:4]), rest[4:]),
        lambda q, k, cos, sin, *rest: _by_pytorch((q, k), cos, sin, rest[:4], rest[4:]),
    ),
    lambda q, k, cos, sin, *rest: (_fake(q, cos, rest[4]), _fake(k, cos, rest[5])),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.dtype = rest[:4], x.dtype
        *options, compute = rest
        return compute(x, cos, sin, *options)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_table_gradients(*ctx.needs_input_grad[1:3])
        return _rope(dy, *ctx.saved_tensors, *_back(ctx.form), ctx.dtype), *(None,) * 8


class _RopePair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *rest: Any,
    ) -> Pair:
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.dtypes = rest[:4], (q.dtype, k.dtype)
        *options, compute = rest
        return compute(q, k, cos, sin, *options)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_table_gradients(*ctx.needs_input_grad[2:4])
        grads = _rope_pair(dq, dk, *ctx.saved_tensors, *_back(ctx.form), *ctx.dtypes)
        return *grads, *(None,) * 9


def _back(form: tuple[bool, bool, bool, bool]) -> Form:
    return Form(*form[:3], not form[3])


def refuse_table_gradients(cos_needs_grad: bool, sin_needs_grad: bool) -> None:
    if cos_needs_grad or sin_needs_grad:
        raise RuntimeError(
            "torch.ops.liger_fx.rope gives cos and sin no gradient; call rope or rope_pair of "
            "liger_fx.kernels.rope, which use PyTorch's operations then"
        )


def _rope_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any) -> torch.Tensor:
    return rope_reference(x, cos, sin, Form(*rest[:4]), rest[4])


def _rope_pair_plain(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any
) -> Pair:
    form = Form(*rest[:4])
    return rope_reference(q, cos, sin, form, rest[4]), rope_reference(k, cos, sin, form, rest[5])


differentiate(_rope, _Rope, _rope_plain)
differentiate(_rope_pair, _RopePair, _rope_pair_plain)
