"""Expressions over sizes, as text: what a saved graph's guards and shapes are made of.

    "8 + (-1)*(sequence % 8)"        ->  allowed
    "__import__('os').system('')"    ->  LoadError

Guards become Python code when a graph is first called, so their grammar is closed: names of sizes,
numbers, arithmetic, comparisons, and the rounding and min/max functions that sizes are made with.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from liger_fx.codec import shown
from liger_fx.errors import LoadError

_MAX_LENGTH = 500
_MAX_DEPTH, _MAX_BRACKETS = 60, 120
_CHARACTERS = re.compile(r"[\w .,()<>=!+*/%-]*", re.ASCII)
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.Not,
    ast.And, ast.Or, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Load,
)  # fmt: skip
_FORMS = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, *_OPERATORS,
)  # fmt: skip
# How many values each function takes, at least and at most.
_FUNCTIONS = {
    "min": (2, 8), "max": (2, 8), "abs": (1, 1), "round": (1, 2),
    "math.floor": (1, 1), "math.ceil": (1, 1), "math.trunc": (1, 1),
}  # fmt: skip
_LARGEST_POWER, _MOST_DIGITS = 8, 20
# What a value may grow to: of 32 sizes multiplied, say. Powers of powers would take for ever.
_BITS_OF_SIZE, _MOST_BITS = 64, 2048


def check(text: str, names: Iterable[str] | None = None) -> str:
    """``text``, an expression of sizes; only of those in ``names``, if given. LoadError if not."""
    used = _names_in(text)
    unknown = set() if names is None else used - set(names)
    if unknown:
        raise LoadError(f"{shown(text)} names {shown(min(unknown))}, which is no size")
    return text


@functools.lru_cache(maxsize=4096)
def _names_in(text: str) -> frozenset[str]:
    if len(text) > _MAX_LENGTH:
        raise LoadError(f"{shown(text)} is too long for an expression of sizes")
    if not _CHARACTERS.fullmatch(text):  # it stands on a line of its own, in brackets
        raise LoadError(f"{shown(text)} is no expression")
    if text.count("(") > _MAX_BRACKETS:  # Python takes 200 inside each other
        raise LoadError(f"{shown(text)} has too many brackets")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1if"
            tree = ast.parse(text, mode="eval")
        names = frozenset(_visit(tree, 0))
        _bits(tree.body)
        return names
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise LoadError(f"{shown(text)} is no expression") from None


def _visit(node: ast.AST, depth: int) -> set[str]:
    if depth > _MAX_DEPTH:
        raise LoadError("an expression of sizes is nested too deeply")
    if isinstance(node, ast.Name):
        return _size_name(node.id)
    if isinstance(node, ast.Constant):
        value: Any = node.value
        if type(value) not in (int, float, bool) or abs(value) > 2**63:
            raise LoadError(f"{shown(value)} is no size")
        return set()
    if isinstance(node, ast.Call):
        return _visit_call(node, depth)
    if not isinstance(node, _FORMS):
        raise LoadError(f"an expression of sizes has no {type(node).__name__}")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        _check_power(node.right)
    return set().union(*(_visit(part, depth + 1) for part in ast.iter_child_nodes(node)))


def _size_name(name: str) -> set[str]:
    if "__" in name or not name.isascii():
        raise LoadError(f"{shown(name)} is no size")
    return {name}


def _visit_call(node: ast.Call, depth: int) -> set[str]:
    name = ast.unparse(node.func)
    if name not in _FUNCTIONS or node.keywords:
        raise LoadError(f"{shown(name)} is no function of sizes")
    least, most = _FUNCTIONS[name]
    if not least <= len(node.args) <= most:
        raise LoadError(f"{name} is called with {len(node.args)} values")
    digits = _number(node.args[1]) if name == "round" and len(node.args) == 2 else 0
    if type(digits) is not int or abs(digits) > _MOST_DIGITS:
        raise LoadError("a size is rounded to so many digits")
    return set().union(*(_visit(part, depth + 1) for part in node.args))


def _bits(node: ast.AST) -> int:
    """How large a value can get; LoadError if too large, and for a division by zero itself."""
    parts = [_bits(part) for part in ast.iter_child_nodes(node)]
    found = max(parts, default=0) + 1
    if isinstance(node, ast.Name | ast.Constant):
        found = _BITS_OF_SIZE
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Mult):
            found = sum(parts)
        elif isinstance(node.op, ast.Pow):
            found = parts[0] * _number(node.right)
        elif isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod) and _number(node.right) == 0:
            raise LoadError("an expression of sizes divides by zero")
    if found > _MOST_BITS:
        raise LoadError("an expression of sizes grows too fast")
    return found


def _number(node: ast.AST) -> Any:
    """The number that a constant is, with its sign; None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    return node.value if isinstance(node, ast.Constant) else None


def _check_power(exponent: ast.expr) -> None:
    power = _number(exponent)
    if type(power) is not int or not 0 <= power <= _LARGEST_POWER:
        raise LoadError(f"an expression of sizes has no power of {ast.unparse(exponent)}")


class SizeNames:
    """Writes the sizes of one graph's tensors in terms of the names that its inputs' sizes have."""

    def __init__(self, graph: fx.Graph, inputs: Mapping[str, tuple[int | str, ...]]) -> None:
        self.named: dict[Any, sympy.Symbol] = {}
        self.printer = PythonPrinter()
        for node in graph.find_nodes(op="placeholder"):
            shape = node.meta["spec"].shape if "spec" in node.meta else ()
            for size, name in zip(shape, inputs.get(str(node.target), ()), strict=False):
                if isinstance(size, sympy.Symbol) and isinstance(name, str):
                    self.named.setdefault(size, sympy.Symbol(name, integer=True))

    def write(self, size: int | sympy.Expr) -> int | str:
        """A number, or the expression's text."""
        if isinstance(size, int):
            return size
        return str(self.printer.doprint(size.xreplace(self.named)))


def read(size: Any) -> int | sympy.Expr:
    """What ``write`` wrote. An expression comes back as one symbol of that name.

    Sizes of a saved graph are shown, and compared as text; nothing computes with them any more.
    """
    if type(size) is int and 0 <= size < 2**63:
        return size
    if type(size) is not str:
        raise LoadError(f"{shown(size)} is no size")
    return _symbol(check(size))


@functools.lru_cache(maxsize=4096)
def _symbol(text: str) -> sympy.Symbol:
    return sympy.Symbol(text, integer=True)
