"""What a trace asked of sizes, as Python expressions over their names.

if hidden.shape[1] > self.window     ->  "sequence > 16"
x.view(4, -1) of 4 rows              ->  "batch == 4"
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from torch.utils._sympy.printers import PythonPrinter

from liger_fx.tracing.fakes import FakeWorld, Question
from liger_fx.tracing.recorder import CannotRecord


def size_guards(world: FakeWorld, questions: Iterable[Question]) -> list[str]:
    """Size comparisons of the model's own code, and sizes of inputs that came out fixed or tied.

    CannotRecord for a comparison with a size that no check before the call can know.
    """
    names = {str(size.node._expr): name for name, size in world.symbols.items()}
    printer = PythonPrinter()

    def text(expr: sympy.Basic) -> str:
        named = {s: sympy.Symbol(names[str(s)], integer=True) for s in expr.free_symbols}
        return printer.doprint(expr.subs(named))

    def is_known(expr: sympy.Basic) -> bool:
        return {str(s) for s in expr.free_symbols} <= names.keys()

    guards = set()
    for expr in dict.fromkeys(map(_as_fact, questions)):
        if not is_known(expr):
            raise CannotRecord(
                "a branch depends on a size that only the graph, as it runs, can tell"
            )
        guards.add(text(expr))
    for name, size in world.symbols.items():
        now = size.node.expr
        if now != size.node._expr and is_known(now):
            guards.add(f"{name} == {text(now)}")
    return sorted(guards - {"True"})


def _as_fact(question: Question) -> sympy.Basic:
    """The answer as a comparison that holds."""
    if question.answer == sympy.true:
        return question.expr
    if question.answer == sympy.false:
        return sympy.Not(question.expr)
    return sympy.Eq(question.expr, question.answer)
