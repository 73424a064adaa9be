"""What a graph was traced from: the text of the model's code, and the versions that ran it.

    {"code": {"transformers.models.llama.modeling_llama": "9c1f...", ...},
     "versions": {"transformers": "5.23.0", "torch": "2.13.0", ...}}

A graph says what the code did when it was traced. Where that code is another now, the graph is not
loaded. Other versions with the same code are fine.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from torch import fx, nn

from liger_fx.errors import LoadError, SaveError
from liger_fx.report.facts import versions
from liger_fx.storage.checks import OBJECT, STRING, expect, fields
from liger_fx.storage.json_file import shown
from liger_fx.storage.sources import locate, module_of
from liger_fx.storage.tree import class_of

# Of transformers, besides the modelling files: what models are built of.
_PARTS = {"transformers.modeling_layers", "transformers.activations", "transformers.pytorch_utils"}
_LOOK_UPS = "transformers.modeling_utils"


def fingerprint(root: nn.Module, graphs: Iterable[fx.Graph]) -> dict[str, Any]:
    """The files of the classes of ``root`` and of the lines that the graphs' nodes come from, and
    the functions that wrap a forward; None for a module whose source is in no file."""
    classes = {class_of(module) for module in root.modules()}
    names = {b.__module__ for cls in classes for b in cls.__mro__ if _is_model_code(b.__module__)}
    for graph in graphs:
        sources = {node.meta["source"] for node in graph.nodes if node.meta.get("source")}
        traced = {module_of(locate(source)[0]) for source in sources}
        # modeling_utils and liger_fx are where calls pass through, not what computes
        names |= {n for n in traced if n != _LOOK_UPS and not n.startswith("liger_fx.")}
    code = {name: _hash_of_module(name) for name in sorted(names)}
    code |= dict(sorted(_wrappers(classes).items()))
    return {"code": code, "versions": versions()}


def require(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint; SaveError where code has no file, so that no change could be noticed."""
    for name, digest in record["code"].items():
        if digest is None:
            raise SaveError(
                f"The code of {name} is in no file, so that a later change of it could not be "
                "noticed: put it into a module."
            )
    return dict(record)


def _is_model_code(module: str) -> bool:
    package = module.partition(".")[0]
    if package == "transformers":
        return module.startswith("transformers.models.") or module in _PARTS
    return package not in ("torch", "builtins", "liger_fx")


def _hash_of_module(name: str) -> str | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    return _hash_of_file(file) if isinstance(file, str) else None


@functools.lru_cache(maxsize=256)
def _hash_of_file(file: str) -> str | None:
    lines = _lines(file)
    return _hash(lines) if lines else None


@functools.lru_cache(maxsize=256)
def _lines(file: str) -> tuple[str, ...]:
    """The lines of a source file, none where it cannot be read."""
    try:
        return tuple(Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return ()


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _wrappers(classes: Iterable[type[nn.Module]]) -> dict[str, str]:
    """The functions around each class's forward (they fill in arguments from the config)."""
    found: dict[str, str] = {}
    for cls in classes:
        function: Any = cls.forward
        while hasattr(function, "__wrapped__"):
            code = function.__code__  # its own: it bears the name of what it wraps
            module = module_of(code.co_filename)
            if not module.startswith("torch."):
                lines = _lines(code.co_filename)[code.co_firstlineno - 1 : _last_line(code)]
                found[f"{module}:{code.co_qualname}"] = _hash(lines)
            function = function.__wrapped__
    return found


def _last_line(code: CodeType) -> int:
    inner = (_last_line(const) for const in code.co_consts if isinstance(const, CodeType))
    return max([code.co_firstlineno, *(line for *_, line in code.co_lines() if line), *inner])


def check(record: Any) -> None:
    """LoadError unless it has the form of a fingerprint."""
    fields(record, {"code": OBJECT, "versions": OBJECT})
    for name, part in record.items():
        for key, value in part.items():
            expect(value, STRING, f"{name}.{shown(key)}")


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """LoadError, naming what changed, unless the code is what it was."""
    then, code = saved["code"], now["code"]
    changed = sorted(name for name in then.keys() | code.keys() if then.get(name) != code.get(name))
    if not changed:
        return
    pairs = [
        f"{name} {saved['versions'].get(name, 'none')}, here {version}"
        for name, version in now["versions"].items()
        if saved["versions"].get(name) != version and name != "python"
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
