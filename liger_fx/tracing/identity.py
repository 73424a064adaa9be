"""Whether code asks if two of its values are one object: the trace saw two different ones.

if key is query: ...      ->  the graph is not for a call that gives one tensor twice

No trace can tell which objects a comparison sees: it is looked for in the compiled code.
"""

from __future__ import annotations

import dis
import inspect
import weakref
from types import CodeType

_LOCAL = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")
_COMPARES: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def compares_identity(cls: type) -> bool:
    """Whether the forward of a module's class asks if two of its local names are one object."""
    found = _COMPARES.get(cls)
    if found is None:
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)  # type: ignore[attr-defined]
        found = _COMPARES[cls] = code is not None and _compares(code)
    return found


def _compares(code: CodeType) -> bool:
    inside = (const for const in code.co_consts if isinstance(const, CodeType))
    if any(map(_compares, inside)):
        return True
    names = [step.opname for step in dis.get_instructions(code) if step.opname != "CACHE"]
    return any(
        name == "IS_OP"
        and names[i - 1].startswith(_LOCAL)
        and ("_LOAD" in names[i - 1].removeprefix("LOAD_") or names[i - 2].startswith(_LOCAL))
        for i, name in enumerate(names)
    )
