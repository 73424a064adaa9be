"""What a graph was traced from: the text of the model's code, and the versions that ran it.

    {"code": {"transformers.models.llama.modeling_llama": "9c1f...", ...},
     "names": {"transformers.models.llama.modeling_llama.DynamicCache": "...", ...},
     "versions": {"transformers": "5.23.0", "torch": "2.13.0", ...}}

A graph says what the code did when it was traced. Where that code is another now, the graph is not
loaded. Other versions with the same code are fine.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import fx

from liger_fx.codec import shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.report.facts import versions
from liger_fx.storage.facts import Describer
from liger_fx.storage.model_code import (
    hash_of_module,
    hash_of_running,
    home_of,
    is_as_written,
    is_model_code,
    layers_of,
    text_of,
)
from liger_fx.storage.reach import Reach
from liger_fx.storage.records import Fingerprint
from liger_fx.storage.sources import locate, module_of
from liger_fx.storage.tree import Original, full_name

_LOOK_UPS = "transformers.modeling_utils"


def fingerprint(model: Original, graphs: Iterable[fx.Graph]) -> Fingerprint:
    """The files of the classes of ``model``, of the functions that their forwards reach and of the
    lines that the graphs' nodes come from; what the names in them stand for.

    No hash stands for the code of a module whose source is in no file.
    """
    reach = model.reach
    names = {b.__module__ for cls in reach.classes for b in cls.__mro__}
    names |= {home_of(function) for function in reach.functions.values()}
    names |= reach.modules
    names = {name for name in names if is_model_code(name)}
    for graph in graphs:
        sources = {node.meta["source"] for node in graph.nodes if node.meta.get("source")}
        traced = {module_of(locate(source)[0]) for source in sources}
        # modeling_utils and liger_fx are where calls pass through, not what computes
        names |= {n for n in traced if n != _LOOK_UPS and not n.startswith("liger_fx.")}
    code = {name: hash_of_module(name) or "" for name in sorted(names)}
    code |= dict(sorted(_functions(reach).items()))
    return Fingerprint(code, dict(sorted(_names(reach).items())), versions())


def require(record: Fingerprint) -> Fingerprint:
    """The fingerprint; SaveError where code has no file, so that no change could be noticed."""
    for name, digest in record.code.items():
        if not digest:
            raise SaveError(
                f"The code of {name} is in no file, so that a later change of it could not be "
                "noticed: put it into a module."
            )
    return record


def _functions(reach: Reach) -> dict[str, str]:
    """What the files of model code do not tell: functions of transformers around a forward, and
    functions that run otherwise than they are written."""
    found: dict[str, str] = {}
    for function in reach.functions.values():
        home = home_of(function)
        name = f"{home}:{function.__code__.co_qualname}"
        if not is_model_code(home):
            if not home.startswith("torch"):
                found[name] = text_of(function) or ""
        elif not is_as_written(function):
            found[f"{name} as it runs"] = hash_of_running(function)
    return found


def _names(reach: Reach) -> dict[str, str]:
    """What global names stand for that model code reads, and methods that another function serves,
    but for a module's own functions and classes."""
    describer, found = Describer(), {}
    for key, value in reach.globals.items():
        if isinstance(value, ModuleType) or key.rpartition(".")[2].startswith("__"):
            continue
        text = _name_of(value) or (
            describer.text_or_type(value) if _is_plain(value) else torch.typename(value)
        )
        if text.replace(":", ".") != key:
            found[key] = text
    for key, method in reach.methods.items():
        name = _name_of(method)
        if name is not None and name.replace(":", ".") != key and not key.startswith("torch."):
            found[key] = name
    return found


def _is_plain(value: Any) -> bool:
    """Whether it is data; what another object does may depend on when it is asked."""
    plain = isinstance(value, enum.Enum | functools.partial) or is_dataclass(value)
    return plain or type(value).__module__ == "builtins"


def _name_of(value: Any) -> str | None:
    layers = layers_of(value)
    if layers and not isinstance(value, functools.partial):
        return f"{home_of(layers[-1])}:{layers[-1].__code__.co_qualname}"
    return full_name(value) if isinstance(value, type) else None


def compare(saved: Fingerprint, now: Fingerprint) -> None:
    """LoadError, naming what changed, unless the code is what it was."""
    then, code = ({**record.names, **record.code} for record in (saved, now))
    changed = sorted(name for name in then.keys() | code.keys() if then.get(name) != code.get(name))
    if not changed:
        return
    pairs = [
        f"{name} {saved.versions.get(name, 'none')}, here {version}"
        for name, version in now.versions.items()
        if saved.versions.get(name) != version and name != "python"
    ]
    versions_then = f" It was saved with {'; '.join(pairs)}." if pairs else ""
    raise LoadError(
        f"the code that the graph was traced from has changed ({_few(changed)})."
        f"{versions_then} The graph could compute something else than the model: make it anew with "
        "liger_fx.optimize",
        "fingerprint",
    )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(shown(name).strip("'") for name in names[:4]) + more
