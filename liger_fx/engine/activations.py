"""The activations that the kernels know, in every spelling, as patterns.

    silu          x * sigmoid(x)
    gelu          0.5 * x * (1 + erf(x / sqrt(2)))
    gelu_tanh     0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    quick_gelu    x * sigmoid(1.702 * x)
    relu          max(x, 0)
    relu_squared  max(x, 0)**2

Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016, for the two GELUs and SiLU.
"""

from __future__ import annotations

import math

from liger_fx.engine.operators import square
from liger_fx.engine.pattern import Number, Op, Pattern, choice, either


def silu(x: Pattern) -> Pattern:
    """Sigmoid-weighted linear unit."""
    return either(Op("silu", (x,)), x * sigmoid(x))


def gelu(x: Pattern) -> Pattern:
    """GELU by the error function."""
    scaled = either(Op("div", (x, Number(math.sqrt(2)))), x * math.sqrt(0.5))
    return either(Op("gelu", (x,)), 0.5 * x * (1.0 + Op("erf", (scaled,))))


def gelu_tanh(x: Pattern) -> Pattern:
    """GELU by its tanh approximation, with its polynomial bracketed in either way."""
    k = 0.044715
    cubic = x + either(k * x**3.0, k * square(x) * x, k * x * x * x)
    factored = x * (1.0 + either(k * square(x), k * x * x))
    scale = math.sqrt(2 / math.pi)
    inner = either(scale * cubic, scale * factored)
    return either(Op("gelu_tanh", (x,)), 0.5 * x * (1.0 + Op("tanh", (inner,))))


def quick_gelu(x: Pattern) -> Pattern:
    """GELU by its sigmoid approximation."""
    return x * sigmoid(1.702 * x)


def relu(x: Pattern) -> Pattern:
    """Rectified linear unit."""
    return Op("relu", (x,))


def relu_squared(x: Pattern) -> Pattern:
    """The square of a rectified linear unit."""
    return square(relu(x))


def sigmoid(x: Pattern) -> Pattern:
    """The logistic function, which is a gate and no activation of an MLP."""
    return Op("sigmoid", (x,))


def activated(x: Pattern) -> Pattern:
    """Any of the activations of MLPs, applied to ``x``; ``match["activation"]`` is its name."""
    functions = (silu, gelu, gelu_tanh, quick_gelu, relu, relu_squared)
    return choice("activation", {function.__name__: function(x) for function in functions})
