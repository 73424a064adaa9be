"""The spellings of arithmetic, reductions and casts: one canonical operator for each.

torch.square(x), x.pow(2), x * x                      ->  square(x)
rsqrt(v), 1 / sqrt(v), sqrt(v).reciprocal(), v**-0.5  ->  rsqrt(v)
x / sqrt(v)                                           ->  mul(x, rsqrt(v))
x.sum(-1, keepdim=True) / width                       ->  mean(x, dims=(-1,), keepdim=True)
x.var(-1, unbiased=False)                             ->  var(x, dims=(-1,), correction=0)
x.to(dtype), x.float(), x.type_as(y)                  ->  cast(x)
x.mul_(y), x *= y                                     ->  mul(x, y), see legality.py
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from liger_fx.engine.term import FLOATS, Term, is_transparent
from liger_fx.engine.view import View

Lowering = Callable[[View, fx.Node], Term | None]

# What else PyTorch's functions take an argument under.
_NUMPY = {"dim": ("axis",), "keepdim": ("keepdims",), "input": ("a", "x", "x1"), "other": ("x2",)}


def argument(node: fx.Node, place: int, *names: str, default: Any = None) -> Any:
    """An argument by its place, or by one of its names, NumPy's included."""
    if place < len(node.args):
        return node.args[place]
    if not node.kwargs:
        return default
    spelled = (s for name in names for s in (name, *_NUMPY.get(name, ())))
    return next((node.kwargs[name] for name in spelled if name in node.kwargs), default)


def is_number(value: Any) -> bool:
    """A plain int or float; no bool, no symbolic size."""
    return type(value) in (int, float)


def plain(op: str, count: int = 1) -> Lowering:
    """An operator of ``count`` operands that has no options, or none set."""
    names = (("input", "self"), ("other",))

    def lower(view: View, node: fx.Node) -> Term | None:
        operands = tuple(argument(node, i, *names[i]) for i in range(count))
        if len(node.args) + len(node.kwargs) > count or None in operands:
            return None
        return view.make(op, operands, node)

    return lower


def _add(op: str) -> Lowering:
    def lower(view: View, node: fx.Node) -> Term | None:
        if argument(node, 2, "alpha", default=1) != 1 or "out" in node.kwargs:
            return None
        a, b = argument(node, 0, "input", "self"), argument(node, 1, "other")
        return view.make(op, (a, b), node)

    return lower


def _mul(view: View, node: fx.Node) -> Term | None:
    a, b = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if a is b and isinstance(a, fx.Node):
        return view.make("square", (a,), node)
    if is_number(b) and b == -1:
        return view.make("neg", (a,), node)
    return view.make("mul", (a, b), node)


def _div(view: View, node: fx.Node) -> Term | None:
    a, b = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if argument(node, 2, "rounding_mode") is not None:
        return None
    if is_number(b):
        return _mean_of_sum(view, node, a, b) or view.make("div", (a, b), node)
    root, casts = _below_casts(view, b)
    if root.op != "sqrt":
        return view.make(
            "reciprocal" if _is_one(a) else "div", (b,) if _is_one(a) else (a, b), node
        )
    if _is_one(a):
        return view.make("rsqrt", root.operands, node, hidden=(*casts, *root.nodes))
    inverse = view.make("rsqrt", root.operands, root.node, hidden=(*casts, *root.hidden))
    return view.make("mul", (a, inverse), node)


def _mean_of_sum(view: View, node: fx.Node, total: Any, count: float) -> Term | None:
    if not isinstance(total, fx.Node):
        return None
    term = view(total)
    if term.op != "sum" or term.attributes["dims"] != (-1,) or term.operands[0].width != count:
        return None
    return view.make("mean", term.operands, node, hidden=term.nodes, **term.attributes)


def _reciprocal(view: View, node: fx.Node) -> Term:
    root, casts = _below_casts(view, argument(node, 0, "input"))
    if root.op == "sqrt":
        return view.make("rsqrt", root.operands, node, hidden=(*casts, *root.nodes))
    return view.make("reciprocal", (argument(node, 0, "input"),), node)


def _pow(view: View, node: fx.Node) -> Term | None:
    base, exponent = argument(node, 0, "input", "self"), argument(node, 1, "exponent")
    if not is_number(exponent) or not isinstance(base, fx.Node):
        return None
    named = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}.get(exponent)
    if named:
        return view.make(named, (base,), node)
    return view.make("pow", (base, float(exponent)), node)


def _reduction(op: str) -> Lowering:
    def lower(view: View, node: fx.Node) -> Term | None:
        if argument(node, 3, "dtype") is not None:
            return None
        return _reduced(view, node, op, argument(node, 2, "keepdim", default=False))

    return lower


def _var(view: View, node: fx.Node) -> Term | None:
    """``unbiased`` is the older word for a correction of 1."""
    correction, unbiased = node.kwargs.get("correction", 1), argument(node, 2, "unbiased")
    if unbiased is not None:
        correction = int(unbiased)
    keepdim = argument(node, 3, "keepdim", default=False)
    return _reduced(view, node, "var", keepdim, correction=correction)


def _reduced(view: View, node: fx.Node, op: str, keepdim: Any, **attributes: Any) -> Term | None:
    x, dims = argument(node, 0, "input", "self"), argument(node, 1, "dim")
    if not isinstance(x, fx.Node) or dims is None:
        return None
    rank = view.rank(x)
    dims = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
    if rank is None or not all(type(d) is int for d in dims):
        return None
    from_end = tuple(sorted(d - rank if d >= 0 else d for d in dims))
    return view.make(op, (x,), node, dims=from_end, keepdim=bool(keepdim), **attributes)


def _cast(view: View, node: fx.Node) -> Term | None:
    x = argument(node, 0, "input", "self")
    before, after = view.spec(x), view.spec(node)
    if before is None or after is None or before.device != after.device:
        return None
    is_rounding = before.dtype in FLOATS and after.dtype in FLOATS
    return view.make("cast" if is_rounding else "convert", (x,), node)


def _alias(view: View, node: fx.Node) -> Term | None:
    """The same value again: contiguous, clone, an expand or view to the shape it has."""
    x = argument(node, 0, "input", "self")
    return view.make("alias", (x,), node) if view.spec(x) == view.spec(node) else None


def _below_casts(view: View, value: Any) -> tuple[Term, tuple[fx.Node, ...]]:
    term, passed = view.operand(value), tuple[fx.Node, ...]()
    while is_transparent(term):
        passed, term = (*passed, *term.nodes), term.operands[0]
    return term, passed


def _is_one(value: Any) -> bool:
    return is_number(value) and value == 1


# (the lowering, what it may name a node, the targets it reads)
_TABLE: list[tuple[Lowering, tuple[str, ...], tuple[Any, ...]]] = [
    (_add("add"), ("add",), (operator.add, torch.add, "add", "add_")),
    (_add("sub"), ("sub",), (operator.sub, torch.sub, torch.subtract, "sub", "subtract")),
    (
        _mul,
        ("mul", "square", "neg"),
        (operator.mul, torch.mul, torch.multiply, "mul", "multiply", "mul_"),
    ),
    (
        _div,
        ("div", "mul", "mean", "rsqrt", "reciprocal"),
        (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide"),
    ),
    (_reciprocal, ("reciprocal", "rsqrt"), (torch.reciprocal, "reciprocal")),
    (_pow, ("pow", "square", "sqrt", "rsqrt"), (operator.pow, torch.pow, "pow")),
    (plain("square"), ("square",), (torch.square, "square")),
    (plain("sqrt"), ("sqrt",), (torch.sqrt, "sqrt", "sqrt_")),
    (plain("rsqrt"), ("rsqrt",), (torch.rsqrt, "rsqrt", "rsqrt_")),
    (plain("neg"), ("neg",), (operator.neg, torch.neg, torch.negative, "neg", "negative")),
    (plain("tanh"), ("tanh",), (torch.tanh, F.tanh, "tanh")),
    (plain("erf"), ("erf",), (torch.erf, torch.special.erf, "erf")),
    (plain("sigmoid"), ("sigmoid",), (torch.sigmoid, torch.special.expit, F.sigmoid, "sigmoid")),
    (plain("view_as_real"), ("view_as_real",), (torch.view_as_real,)),
    (_reduction("mean"), ("mean",), (torch.mean, "mean")),
    (_reduction("sum"), ("sum",), (torch.sum, "sum")),
    (_var, ("var",), (torch.var, "var")),
    (_cast, ("cast", "convert"), ("to", "float", "half", "bfloat16", "double", "type", "type_as")),
    (_alias, ("alias",), ("contiguous", "clone", torch.clone, "expand")),
]

ARITHMETIC = {target: (lower, ops) for lower, ops, targets in _TABLE for target in targets}
