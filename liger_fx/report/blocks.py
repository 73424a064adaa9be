"""The blocks of a model as plain data: which there are, which are alike, what no graph served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockRow:
    """Alike blocks, which share their graphs.

    paths: where they hang; "" is the root. calls: each kind of call that there is a graph for, in
    words. code: the graph of the first, as Python; "" if there is none.
    """

    class_name: str
    paths: tuple[str, ...]
    calls: tuple[str, ...]
    code: str


@dataclass(frozen=True)
class FallbackRow:
    """A call of the block at ``path`` that its own forward served, and why."""

    path: str
    class_name: str
    call: str
    reason: str
