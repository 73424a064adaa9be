"""One position of a static cache, against the operations that transformers spells it with."""

from __future__ import annotations

import pytest
import torch

from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.static_cache import append_position
from tests.kernels.accuracy import DEVICE, DTYPES, Draw, drawing

# batch, heads, width of a key and of a value; the last are more than one program's.
SHAPES = [(1, 2, 8, 8), (3, 5, 12, 7), (40, 16, 16, 16)]


def position(draw: Draw, batch: int, heads: int, dim: int) -> torch.Tensor:
    """As a projection gives it: heads beside each other."""
    return draw(batch, 1, heads, dim).transpose(1, 2)


def spelled(
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    keys.index_copy_(2, length.view(1), key)
    values.index_copy_(2, length.view(1), value)
    length.add_(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_position_after_position(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, heads, key_dim, value_dim = shape
    draw = drawing(dtype)
    ours = [
        draw(batch, heads, 6, key_dim),
        draw(batch, heads, 6, value_dim),
        torch.tensor(3, device=DEVICE),
    ]
    plain = [t.clone() for t in ours]
    for _ in range(3):
        new = [position(draw, batch, heads, dim) for dim in (key_dim, value_dim)]
        append_position(*ours, *new)
        spelled(*plain, *new)
        assert all(map(torch.equal, ours, plain))


def test_layouts() -> None:
    """A part of a larger cache, positions before heads, a key whose last dimension is apart."""
    draw = drawing(torch.float32)
    memory, moved = draw(2, 3, 9, 8), draw(2, 6, 3, 8).transpose(1, 2)
    keys, length = memory[:, :, 2:8], torch.tensor(1, device=DEVICE)
    before = memory.clone()
    for key in (draw(2, 3, 1, 8), draw(2, 3, 8, 1).transpose(2, 3), draw(2, 3, 1, 16)[..., ::2]):
        place = int(length)
        append_position(keys, moved, length, key, -key)
        assert torch.equal(keys[:, :, place], key[:, :, 0])
        assert torch.equal(moved[:, :, place], -key[:, :, 0])
    assert int(length) == 4
    before[:, :, 3:6] = memory[:, :, 3:6]
    assert torch.equal(memory, before)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="there it is a device-side assertion")
def test_a_full_cache_is_refused() -> None:
    draw = drawing(torch.float32)
    cache = draw(1, 2, 4, 8), draw(1, 2, 4, 8), torch.tensor(4)
    with pytest.raises(IndexError):
        append_position(*cache, draw(1, 2, 1, 8), draw(1, 2, 1, 8))
