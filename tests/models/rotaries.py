"""The rotary embedding as people write it: x rotated by angles (batch or 1, sequence, width)."""

from __future__ import annotations

import torch
from torch import nn

T = torch.Tensor
Pair = tuple[T, T]


def angles(length: int, width: int, dtype: torch.dtype, interleaved: bool = False) -> Pair:
    """cos and sin (1, length, width) of the usual angles, halves or neighbours alike."""
    inverse = 1.0 / 100 ** (torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(length).float(), inverse)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos()[None].to(dtype), angle.sin()[None].to(dtype)


def rotate_half(x: T) -> T:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_neighbours(x: T) -> T:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class HeadsFirst(nn.Module):
    """q (B, 4, S, D) and k (B, 2, S, D), half-split."""

    layout, interleaved, share = 1, False, 1.0

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class HeadsLast(HeadsFirst):
    """q (B, S, 4, D): heads after positions."""

    layout = 2

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Interleaved(HeadsFirst):
    interleaved = True

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos[:, None], sin[:, None]
        return q * cos + rotate_neighbours(q) * sin, k * cos + rotate_neighbours(k) * sin


class InterleavedHeadsLast(HeadsFirst):
    layout, interleaved = 2, True

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos[:, :, None], sin[:, :, None]
        return q * cos + rotate_neighbours(q) * sin, k * cos + rotate_neighbours(k) * sin


class PartOfTheHead(HeadsFirst):
    """Only the first half of each head turns, the rest passes."""

    share = 0.5

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        width = q.shape[-1] // 2
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first_q, first_k = q[..., :width], k[..., :width]
        first_q = first_q * cos + rotate_half(first_q) * sin
        first_k = first_k * cos + rotate_half(first_k) * sin
        return torch.cat((first_q, q[..., width:]), -1), torch.cat((first_k, k[..., width:]), -1)


class InFloat32AndBack(HeadsFirst):
    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
        wide_q, wide_k = q.float(), k.float()
        turned_q = wide_q * cos + rotate_half(wide_q) * sin
        turned_k = wide_k * cos + rotate_half(wide_k) * sin
        return turned_q.to(q.dtype), turned_k.to(k.dtype)


class OneTensor(HeadsFirst):
    """The query alone; the key goes through as it is."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return (q * cos) + (rotate_half(q) * sin), k


class Sliced(HeadsFirst):
    """Halves by slices, terms the other way round, and functions instead of operators."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return self.turn(q, cos, sin), self.turn(k, cos, sin)

    def turn(self, x: T, cos: T, sin: T) -> T:
        half = x.shape[-1] // 2
        turned = torch.cat([torch.neg(x[..., half:]), x[..., :half]], dim=-1)
        return torch.add(torch.mul(sin, turned), torch.mul(cos, x))


SPELLINGS: tuple[type[HeadsFirst], ...] = (
    HeadsFirst,
    HeadsLast,
    Interleaved,
    InterleavedHeadsLast,
    PartOfTheHead,
    InFloat32AndBack,
    OneTensor,
    Sliced,
)


class TurnedBack(HeadsFirst):
    """The inverse rotation: the sign of the other half."""

    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos - rotate_half(q) * sin, k * cos - rotate_half(k) * sin


class NoMinus(HeadsFirst):
    def forward(self, q: T, k: T, cos: T, sin: T) -> Pair:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = q.chunk(2, -1)
        return q * cos + torch.cat((second, first), -1) * sin, k


NEAR_MISSES: tuple[type[HeadsFirst], ...] = (TurnedBack, NoMinus)
