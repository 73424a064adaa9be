"""One more position of a layer's keys and values in a cache of fixed length.

    place = length.view(1); keys.index_copy_(2, place, key); values.index_copy_(2, place, value)
    length.add_(1)
    ->  append_position(keys, values, length, key, value)        one launch

The length stays on the device, so that a step can be recorded and replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_fx.kernels.launch import Launch, ceil_div, launch, power_of_two, uses_triton
from liger_fx.kernels.library import define_op


def append_position(
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Write key and value at position `length`, which is one more afterwards.

    keys, values: (batch, heads, positions, dim); key, value: (batch, heads, 1, dim) of their
    dtypes; the two may differ in dim. length: an int64 tensor of one element. No gradients are
    recorded. IndexError where the cache is full, which is a device-side assertion on a GPU.
    """
    _append_position(keys, values, length, key, value)


@triton.jit
def _write(
    from_ptr, to_ptr, row, mask, heads, place, from_batch, from_head, to_batch, to_head, to_place,
    DIM: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, COLS)[None, :]
    batch, head = (row // heads)[:, None], (row % heads)[:, None]
    mask = mask[:, None] & (col < DIM)
    new = tl.load(from_ptr + batch * from_batch + head * from_head + col, mask)
    tl.store(to_ptr + batch * to_batch + head * to_head + place * to_place + col, new, mask)


# debug: for its assertion, as index_copy_ has one.
@triton.jit(debug=True)
def _kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, length_ptr, rows, heads, positions,
    key_batch, key_head, value_batch, value_head,
    keys_batch, keys_head, keys_place, values_batch, values_head, values_place,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, COUNTS: tl.constexpr,
    ROWS: tl.constexpr, KEY_COLS: tl.constexpr, VALUE_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(length_ptr)
    tl.device_assert(place < positions, "a static cache is full")
    mask = row < tl.where(place < positions, rows, 0)
    _write(
        key_ptr, keys_ptr, row, mask, heads, place, key_batch, key_head,
        keys_batch, keys_head, keys_place, KEY_DIM, KEY_COLS,
    )  # fmt: skip
    _write(
        value_ptr, values_ptr, row, mask, heads, place, value_batch, value_head,
        values_batch, values_head, values_place, VALUE_DIM, VALUE_COLS,
    )  # fmt: skip
    if COUNTS:
        tl.debug_barrier()  # every thread has read the length
        tl.store(length_ptr, place + 1)


def append_launch(rows: int, dim: int) -> Launch:
    """Up to 8192 elements of each a program: one program serves a small batch, and counts."""
    cols = power_of_two(dim)
    return Launch(min(power_of_two(rows), max(1, 8192 // cols)), cols, warps=8)


def _run(
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    dense = key.stride(-1) == value.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    if not (dense and uses_triton(keys, values, key, value)):
        place = length.view(1)
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        length.add_(1)
        return
    batch, heads, positions, dim = keys.shape
    rows = batch * heads
    tile = append_launch(rows, dim)
    programs = ceil_div(rows, tile.rows)
    launch(
        _kernel, programs, keys.device, key, value, keys, values, length, rows, heads, positions,
        *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        KEY_DIM=dim, VALUE_DIM=values.shape[3], COUNTS=programs == 1, ROWS=tile.rows,
        KEY_COLS=tile.cols, VALUE_COLS=power_of_two(values.shape[3]), num_warps=tile.warps,
    )  # fmt: skip
    if programs > 1:
        length.add_(1)


_append_position = define_op(
    "append_position(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) length, Tensor key,"
    " Tensor value) -> ()",
    _run,
    lambda keys, values, length, key, value: None,
)
