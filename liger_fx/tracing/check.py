"""Conditions on the world outside a call, compiled to one Python function.

add("{}['training'] is True", held); add("{}.get('norm') is {}", modules, norm)
 ->
    def holds():
        try: return (v0['training'] is True) and (v1.get('norm') is v2)
        except KeyError: return False

It runs at every call of every block; a loop over the conditions would cost twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any


class Check:
    """Conditions that shall all hold."""

    def __init__(self) -> None:
        self._conditions: list[str] = []
        self._values: list[Any] = []

    def add(self, condition: str, *values: Any) -> None:
        """An expression, with each of its values in the place of a pair of braces."""
        names = (f"v{n}" for n in itertools.count(len(self._values)))
        self._conditions.append(f"({condition.format(*itertools.islice(names, len(values)))})")
        self._values += values

    def compiled(self) -> Callable[[], bool]:
        """What tells whether all conditions hold at the moment."""
        text = " and ".join(self._conditions) or "True"
        holds: Callable[[], bool] = _factory(text, len(self._values))(*self._values)
        return holds


@functools.lru_cache(1024)  # alike blocks have the same text
def _factory(text: str, count: int) -> Any:
    names = ", ".join(f"v{n}" for n in range(count))
    scope: dict[str, Any] = {}
    source = "\n".join(
        [
            f"def make({names}):",
            "    def holds():",
            f"        try: return {text}",
            # What was in a dictionary is not there any more.
            "        except KeyError: return False",
            "    return holds",
        ]
    )
    exec(compile(source, "<guards>", "exec"), scope)
    return scope["make"]
