"""The words of the pattern language: a function for each operator that rules speak of."""

from __future__ import annotations

from liger_fx.engine.pattern import Op, Part, Pattern, either


def square(x: Pattern) -> Pattern:
    """x * x"""
    return Op("square", (x,))


def rsqrt(x: Pattern) -> Pattern:
    """1 / sqrt(x)"""
    return Op("rsqrt", (x,))


def sqrt(x: Pattern) -> Pattern:
    """The square root, where nothing divides by it."""
    return Op("sqrt", (x,))


def mean(x: Pattern) -> Pattern:
    """The mean over the last dimension, which is kept with size 1."""
    return Op("mean", (x,), {"dims": (-1,), "keepdim": True})


def variance(x: Pattern) -> Pattern:
    """The mean square of what is left of the last dimension without its mean."""
    own = Op("var", (x,), {"dims": (-1,), "keepdim": True, "correction": 0})
    return either(mean(square(x - mean(x))), own)


def linear(x: Pattern, module: Pattern | None = None) -> Pattern:
    """A linear layer; ``module`` captures the path of the leaf, None for F.linear on a weight."""
    return Op("linear", (x,), {} if module is None else {"module": module})


def tanh(x: Pattern) -> Pattern:
    """The hyperbolic tangent."""
    return Op("tanh", (x,))


def div(x: Pattern, by: Pattern) -> Pattern:
    """x / by"""
    return Op("div", (x, by))


def rows(x: Pattern) -> Pattern:
    """All dimensions but the last as one, or the tensor itself."""
    return either(Op("rows", (x,)), x)


def unsqueeze(x: Pattern, dim: Pattern) -> Pattern:
    """A new dimension of size 1, at ``dim`` counted from the end."""
    return Op("unsqueeze", (x,), {"dim": dim})


def cat(a: Pattern, b: Pattern) -> Pattern:
    """a beside b, along the last dimension."""
    return Op("cat", (a, b), {"dim": -1})


def interleave(a: Pattern, b: Pattern) -> Pattern:
    """a0 b0 a1 b1 ... along the last dimension."""
    return Op("interleave", (a, b))


def lower(x: Pattern) -> Pattern:
    """The first half of the last dimension."""
    return Part("lower", x)


def upper(x: Pattern) -> Pattern:
    """The second half of the last dimension."""
    return Part("upper", x)


def even(x: Pattern) -> Pattern:
    """Places 0, 2, 4, ... of the last dimension."""
    return Part("even", x)


def odd(x: Pattern) -> Pattern:
    """Places 1, 3, 5, ... of the last dimension."""
    return Part("odd", x)
