"""What a trace asked of sizes, as Python expressions over their names.

if hidden.shape[1] > self.window     ->  "sequence > 16"
x.view(4, -1) of 4 rows              ->  "batch == 4"
x[: int(x.shape[0] ** 0.5)] of 4     ->  "batch == 4", as for all that has no plain arithmetic
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.logic.boolalg import Boolean
from torch.utils._sympy import functions
from torch.utils._sympy.printers import PythonPrinter

from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.fakes import FakeWorld, Question

# What a guard may be made of (liger_fx/storage/expressions.py reads no more), besides powers.
_PLAIN = (
    sympy.Symbol, sympy.Number, Boolean, sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.Abs,
    sympy.floor, sympy.ceiling, functions.Max, functions.Min, functions.FloorDiv, functions.Mod,
    functions.PythonMod, functions.CleanDiv, functions.IntTrueDiv, functions.FloatTrueDiv,
    functions.FloorToInt, functions.CeilToInt, functions.TruncToInt, functions.RoundToInt,
    functions.RoundDecimal, functions.ToFloat,
)  # fmt: skip
_LARGEST_POWER = 8


class _Printer(PythonPrinter):
    def _print_ToFloat(self, expr: sympy.Expr) -> str:
        return f"({self._print(expr.args[0])})"  # Python's numbers become floats by themselves


def check_known(world: FakeWorld, questions: Iterable[Question]) -> None:
    """CannotRecord for a question about a size that no check before the call can know, or an answer
    that was taken for granted."""
    known = {str(size.node._expr) for size in world.symbols.values()}
    if not all({str(s) for s in question.fact.free_symbols} <= known for question in questions):
        raise CannotRecord("a branch depends on a size that only the graph, as it runs, can tell")
    if not world.results_are_free:
        raise CannotRecord("a size of what a module returns is taken for what it was in an example")


def size_guards(world: FakeWorld, questions: Iterable[Question]) -> list[str]:
    """Size comparisons of the model's own code, and sizes of inputs that came out fixed or tied.

    CannotRecord as ``check_known`` has it.
    """
    questions = list(questions)
    check_known(world, questions)
    names = {str(size.node._expr): name for name, size in world.symbols.items()}
    examples, printer = world.examples, _Printer()

    def text(expr: sympy.Basic) -> str:
        named = {s: sympy.Symbol(names[str(s)], integer=True) for s in expr.free_symbols}
        return str(printer.doprint(expr.subs(named)))

    def is_known(expr: sympy.Basic) -> bool:
        return {str(s) for s in expr.free_symbols} <= names.keys()

    guards = set()
    for fact in dict.fromkeys(question.fact for question in questions):
        if _is_plain(fact):
            guards.add(text(fact))
        else:
            guards.update(text(sympy.Eq(s, examples[s])) for s in fact.free_symbols)
    for name, size in world.symbols.items():
        now = size.node.expr
        if now != size.node._expr and is_known(now):
            guards.add(f"{name} == {text(now)}")
    return sorted(guards - {"True"})


def _is_plain(expr: sympy.Basic) -> bool:
    """Whether a guard can compute it anew at each call."""
    if isinstance(expr, (sympy.Pow, functions.PowByNatural)):
        exponent = expr.args[1]
        is_plain = exponent.is_Integer and 0 <= int(exponent) <= _LARGEST_POWER
    else:
        is_plain = isinstance(expr, _PLAIN)
    return bool(is_plain) and all(map(_is_plain, expr.args))
