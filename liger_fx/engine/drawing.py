"""The nodes of one site as plain data, before and after, with what they move and keep in memory.

    to -> pow -> mean -> add -> rsqrt -> mul -> to -> mul      ->      LigerRMSNorm

A drawing names no layer: sites that are alike share one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """One node.

    kind: "input" (made outside the site), "parameter", "operator", "view" (moves no data) or
        "module".
    label: the operator's, module type's, parameter's or input's name.
    detail: arguments that are no nodes ("-1, keepdim=True"), or the name of a module.
    dtype, shape: of its tensor, None where it has none; a size is a number or an expression of the
        names of the inputs' sizes ("batch").
    reads: places in the same drawing of the boxes it reads, in the order of its arguments.
    result: whether something outside the site reads it.
    """

    kind: str
    label: str
    detail: str
    dtype: str | None
    shape: tuple[int | str, ...] | None
    reads: tuple[int, ...]
    result: bool


@dataclass(frozen=True)
class Bytes:
    """An amount of memory: for each token, and beside that whatever the number of tokens."""

    per_token: int
    fixed: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.per_token + other.per_token, self.fixed + other.fixed)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.per_token - other.per_token, self.fixed - other.fixed)


@dataclass(frozen=True)
class Cost:
    """What one run of a site's forward costs.

    traffic: bytes read from and written to memory. saved: bytes kept for the backward pass,
    without parameters.
    """

    traffic: Bytes
    saved: Bytes


@dataclass(frozen=True)
class Drawing:
    """What stood at a site and what stands there now; ``after`` is empty where nothing changed."""

    before: tuple[Box, ...]
    after: tuple[Box, ...] = ()
    cost_before: Cost | None = None
    cost_after: Cost | None = None
