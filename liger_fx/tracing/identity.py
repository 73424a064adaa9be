"""Whether a graph holds only for tensors that are all different objects.

if key is query: ...                the trace saw two different ones
x.add_(1); y.sum()                  the graph writes into what is y as well, if x is y

Which objects a comparison sees no trace can tell: it is looked for in the compiled code.
"""

from __future__ import annotations

import dis
import inspect
import weakref
from types import CodeType

from torch import fx, nn

from liger_fx.tracing.effects import is_effectful

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


def writes_into_inputs(graph: fx.Graph, root: nn.Module) -> bool:
    """Whether a tensor that the graph is given is written into, or what may be a view of one."""
    return any(_is_of_input(node) for node in graph.nodes if is_effectful(node, root))


def _is_of_input(node: fx.Node) -> bool:
    while node.op != "placeholder":
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        node = source
    return "spec" in node.meta
