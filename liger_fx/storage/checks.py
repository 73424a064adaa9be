"""Names and paths of a saved graph: what they may be, so that they lead to nothing else.

model.layers.0.mlp     ->  a path
model.norm.__class__   ->  LoadError: is no path of a module or tensor
"""

from __future__ import annotations

import re
from keyword import iskeyword
from typing import Annotated

from liger_fx.codec import shown
from liger_fx.errors import LoadError

_PATH = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,60}", re.ASCII)


def identifier(name: str) -> str:
    """``name``, which can stand in generated Python code; none of Python's own."""
    fits = name.isascii() and name.isidentifier() and len(name) <= 500
    if not fits or iskeyword(name) or name.startswith("__"):
        raise LoadError(f"{shown(name)} is no name")
    return name


def module_path(path: str) -> str:
    """``path``, names and numbers with dots between.

    No part has two leading underscores, so that a path leads to nothing of Python's own.
    """
    if not _PATH.fullmatch(path) or path.startswith("__") or ".__" in path:
        raise LoadError(f"{shown(path)} is no path of a module or tensor")
    return path


def _path_or_root(path: str) -> str:
    return path and module_path(path)


def _part_of_path(name: str) -> str:
    if "." in module_path(name):
        raise LoadError(f"{shown(name)} is no name of a module")
    return name


Name = Annotated[str, identifier]
Path = Annotated[str, module_path]
RootPath = Annotated[str, _path_or_root]  # empty for the model itself
PartOfPath = Annotated[str, _part_of_path]
