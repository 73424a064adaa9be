"""Whether code asks if two of its values are one object: the trace saw two different ones.

if key is query: ...      ->  the graph is not for a call that gives one tensor twice

No trace can tell which objects a comparison sees: it is looked for in the compiled code. What looks
a tensor up in a dictionary or set asks it for its hash, and is refused.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable
from types import CodeType

from liger_fx.tracing.reach import Reach, made_by

_BY_NAME = frozenset({"is_", "is_not"})  # of the module operator
# A class, a dtype, None, a flag: no tensor that another call might give.
_NO_TENSOR = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST")


def compares_objects(reaches: Iterable[Reach]) -> bool:
    """Whether code that is reached asks if two of its values are one object."""
    return any(
        not _BY_NAME.isdisjoint(reach.names)
        or any(_compares(function.__code__) for function in reach.code)
        for reach in reaches
    )


@functools.lru_cache(4096)
def _compares(code: CodeType) -> bool:
    if any(map(_compares, made_by(code))):
        return True
    names: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and _origin(names) not in _NO_TENSOR:
            return True
        if step.opname != "CACHE":
            names.append(step.opname)
    return False


def _origin(names: list[str]) -> str:
    """How the value on the right got its name, whatever attributes were taken of it."""
    return next((name for name in reversed(names) if name != "LOAD_ATTR"), "")
