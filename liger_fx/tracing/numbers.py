"""Plain numbers that are inputs of a graph, because the model's code never asks for their value.

    loss / num_items_in_batch       ->  a node: any number of items
    if num_items_in_batch > 8       ->  AsksNumber: the graph holds for one number

A trace hands them in as numbers of these classes. What compares or computes with one in Python asks
for its value. What only C code sees (``range(n)``) is found by tracing twice, with two numbers.
"""

from __future__ import annotations

import math
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
    return int.__pos__(value) if isinstance(value, int) else float.__pos__(value)  # -0.0 stays


def another(value: Any) -> Any:
    """A number of the same kind, with other properties; a float has another sign, too."""
    if isinstance(value, float):
        return math.copysign(abs(value) * 2 + 3, -math.copysign(1, value))
    return type(value)(value * 2 + 3)


def _asking(name: str) -> Any:
    def method(self: Any, *others: Any) -> Any:
        if others and isinstance(others[0], torch.Tensor):
            return NotImplemented  # the tensor's own operator records it
        raise AsksNumber

    method.__name__ = name
    return method


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow divmod "
    "rdivmod neg abs eq ne lt le gt ge and or xor lshift rshift bool hash index int float round "
    "trunc str repr format"
)
for _cls in (TracedInt, TracedFloat):
    for _name in (f"__{_operator}__" for _operator in _OPERATORS.split()):
        if hasattr(_cls.__mro__[1], _name):
            setattr(_cls, _name, _asking(_name))
