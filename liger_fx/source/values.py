"""Names, paths and values as pieces of Python source, and nothing else that a graph holds.

model.layers.0.mlp           self.model.layers[0].mlp
slice(None, 8), float32      :8, torch.float32
"a\\n\"\"\"; import os"        'a\\n\"\"\"; import os', one literal

Every text that becomes source passes through one of these functions: a name is a name, a string is
a literal, and the rest stands behind a #. What has no such form is a SaveError.
"""

from __future__ import annotations

import keyword
import math
from typing import Any

import torch
from torch import fx

from liger_fx.errors import SaveError, printable

_LITERALS = (
    type(None), bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format,
)  # fmt: skip


def is_name(text: str) -> bool:
    """Whether it can stand in Python source as a name, and means nothing there already."""
    return text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


def name_text(text: str) -> str:
    """``text``, a name; SaveError for any other."""
    if not is_name(text):
        raise SaveError(f"{printable(ascii(text), 80)} is no name that source can have.")
    return text


def comment(text: str) -> str:
    """``text`` behind a #, all of it on that one line."""
    return f"# {printable(text, 300)}"


def path_text(path: str, text: str = "self") -> str:
    """``self.model.layers[0].mlp`` for ``model.layers.0.mlp``; ``text`` stands for the model."""
    for part in path.split(".") if path else ():
        if part.isdecimal() and part == str(int(part)):
            text += f"[{part}]"
        elif is_name(part):
            text += f".{part}"
        else:
            text = f"getattr({text}, {part!r})"
    return text


def assign_text(path: str, value: str, text: str = "self") -> str:
    """A statement that puts ``value`` at ``path``."""
    owner, _, name = path.rpartition(".")
    if is_name(name):
        return f"{path_text(path, text)} = {value}"
    return f"setattr({path_text(owner, text)}, {name!r}, {value})"


def value_text(value: Any) -> str:
    """An argument as Python text; nodes are their names. SaveError for what has no text."""
    if isinstance(value, fx.Node):
        return path_text(str(value.target)) if value.op == "get_attr" else name_text(value.name)
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{value_text(k)}: {value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(map(value_text, (value.start, value.stop, value.step)))})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if value is ...:
        return "..."
    if type(value) not in _LITERALS:  # others may have any text for their repr
        raise SaveError(f"A {type(value).__name__} cannot be written as source.")
    return repr(value)


def operand_text(value: Any) -> str:
    """A value beside an operator: -1 ** x would be -(1 ** x)."""
    text = value_text(value)
    return f"({text})" if text.startswith("-") else text


def index_text(value: Any) -> str:
    """What stands between brackets: slices with colons."""
    if isinstance(value, tuple) and value:
        return ", ".join(map(index_text, value)) + ("," if len(value) == 1 else "")
    if not isinstance(value, slice):
        return value_text(value)
    parts = ["" if p is None else value_text(p) for p in (value.start, value.stop, value.step)]
    return ":".join(parts[:2] if not parts[2] else parts)
