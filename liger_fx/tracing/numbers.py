"""Plain numbers that are inputs of a graph, because the model's code never asks for their value.

    loss / num_items_in_batch       ->  a node: any number of items
    if num_items_in_batch > 8       ->  AsksNumber: the graph holds for one number

A trace hands them in as numbers of these classes. What compares or computes with one in Python asks
for its value. What only C code sees (``range(n)``) is found by tracing twice, with two numbers.
"""

from __future__ import annotations

from typing import Any

import torch


class AsksNumber(BaseException):
    """The code asks for the value of a number. (No Exception: the model must not catch it.)"""


class TracedInt(int):
    """An int that stands for any."""


class TracedFloat(float):
    """A float that stands for any."""


TracedNumber = TracedInt | TracedFloat


def traced_number(value: Any) -> Any:
    """The number as one that stands for any."""
    return TracedInt(value) if isinstance(value, int) else TracedFloat(value)


def plain(value: Any) -> Any:
    """The number itself."""
    kind = int if isinstance(value, int) else float
    return kind.__add__(value, kind())


def another(value: Any) -> Any:
    """A number of the same kind, with other properties."""
    return type(value)(value * 2 + 3)


def _asking(name: str) -> Any:
    def method(self: Any, *others: Any) -> Any:
        if others and isinstance(others[0], torch.Tensor):
            return NotImplemented  # the tensor's own operator records it
        raise AsksNumber

    method.__name__ = name
    return method


_ASKING = [
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__floordiv__",
    "__rfloordiv__",
    "__mod__",
    "__rmod__",
    "__pow__",
    "__rpow__",
    "__neg__",
    "__abs__",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__bool__",
    "__hash__",
    "__index__",
    "__int__",
    "__float__",
    "__round__",
    "__str__",
    "__repr__",
    "__format__",
    "__and__",
    "__or__",
    "__xor__",
    "__lshift__",
    "__rshift__",
    "__divmod__",
    "__rdivmod__",
    "__trunc__",
]
for _cls in (TracedInt, TracedFloat):
    for _name in _ASKING:
        if hasattr(_cls.__mro__[1], _name):
            setattr(_cls, _name, _asking(_name))
