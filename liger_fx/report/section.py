"""What a report is made of: titled tables, sentences, listings; each face shows them in its way.

Table("Rules", ("rule", "found"), [("rms_norm", 65)])     Lines("Versions", ("torch 2.13.0",))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int


@dataclass(frozen=True)
class Table:
    """Rows under headers; a number stands to the right."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


@dataclass(frozen=True)
class Lines:
    """Sentences, one a line."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Subgraph:
    """The nodes of one kind of site: (text, dtype and shape) before, and after if rewritten."""

    title: str
    before: list[tuple[str, str]]
    after: list[tuple[str, str]]


Section = Table | Lines | Subgraph
