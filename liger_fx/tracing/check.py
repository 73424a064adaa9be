"""Conditions on the world outside a call, compiled to one Python function.

add("{}['training'] is True", held); add("{}.get('norm') is {}", modules, norm)
 ->
    def holds(v0=held, v1=modules, v2=norm):
        try: return (v0['training'] is True) and (v1.get('norm') is v2)
        except KeyError: return False

It runs at every call of every block; a loop over the conditions would cost twice. The values are
defaults, side by side in memory, each once: the cells of a closure lie about, and a deep model has
many.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any


class Check:
    """Conditions that shall all hold."""

    def __init__(self) -> None:
        self._conditions: list[str] = []
        self._values: list[Any] = []
        self._names: dict[int, str] = {}

    def add(self, condition: str, *values: Any) -> None:
        """An expression, with each of its values in the place of a pair of braces."""
        for value in values:
            if id(value) not in self._names:
                self._names[id(value)] = f"v{len(self._values)}"
                self._values.append(value)
        self._conditions.append(f"({condition.format(*(self._names[id(v)] for v in values))})")

    def compiled(self) -> Callable[[], bool]:
        """What tells whether all conditions hold at the moment."""
        code = _compiled(" and ".join(self._conditions) or "True", len(self._values))
        return FunctionType(code, _GLOBALS, "holds", tuple(self._values))


_GLOBALS = {"__builtins__": builtins}  # one for all: Python remembers where in it a name stood


@functools.lru_cache(1024)  # alike blocks have the same text
def _compiled(text: str, count: int) -> CodeType:
    names = ", ".join(f"v{n}" for n in range(count))
    source = "\n".join(
        [
            f"def holds({names}):",
            f"    try: return {text}",
            # What was in a dictionary is not there any more.
            "    except KeyError: return False",
        ]
    )
    scope: dict[str, Any] = {}
    exec(compile(source, "<guards>", "exec"), scope)
    code: CodeType = scope["holds"].__code__
    return code
