"""The named modules of a rewritten tree, as records and back.

   LigerRMSNorm((56,), eps=1e-06) at model.norm
<->
   {"path": "model.norm", "class": "LigerRMSNorm", "options": {"width": 56, "eps": 1e-06, ...},
    "parameters": ["weight"], "children": []}
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import fx, nn

import liger_fx.modules
from liger_fx.errors import LoadError
from liger_fx.modules.origin import remember
from liger_fx.storage.checks import (
    LIST,
    OBJECT,
    STRING,
    fields,
    module_path,
    part_of_path,
    strings,
)
from liger_fx.storage.json_file import shown

CLASSES: dict[str, Any] = {
    name: getattr(liger_fx.modules, name) for name in liger_fx.modules.__all__
}
_KINDS = tuple(CLASSES.values())
_RECORD = {
    "path": STRING, "class": STRING, "options": OBJECT, "parameters": LIST, "children": LIST,
}  # fmt: skip
_OPTIONAL = {"also": LIST}
_LARGEST = 2**24


def is_named(module: nn.Module) -> bool:
    """Whether it is one of liger_fx's modules, and no subclass of one."""
    return type(module) in _KINDS


def describe(root: nn.Module) -> list[dict[str, Any]]:
    """A record for each named module in the tree's order; ``also`` are its further paths."""
    records: dict[nn.Module, dict[str, Any]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if not is_named(module):
            continue
        if module in records:
            records[module].setdefault("also", []).append(path)
            continue
        records[module] = {
            "path": path,
            "class": type(module).__name__,
            "options": module.options(),
            "parameters": [name for name, p in module._parameters.items() if p is not None],
            "children": list(module._modules),
        }
    return list(records.values())


def check(record: Any) -> dict[str, Any]:
    """``record`` with nothing wrong in it; what it says is held against the tree by ``install``."""
    fields(record, _RECORD, _OPTIONAL)
    module_path(record["path"], "path")
    if record["class"] not in CLASSES:
        raise LoadError(f"{shown(record['class'])} is no named module", "class")
    known = _option_types(CLASSES[record["class"]])
    for name, value in record["options"].items():
        if name not in known:
            raise LoadError(f"{record['class']} has no option {shown(name)}", "options")
        if not _is_a(value, known[name]):
            raise LoadError(f"{shown(value)} is no value for it", f"options.{name}")
    for place in ("parameters", "children"):
        for i, name in enumerate(strings(record[place], place)):
            part_of_path(name, f"{place}[{i}]")
    for i, path in enumerate(strings(record.get("also", []), "also")):
        module_path(path, f"also[{i}]")
    return record


@functools.cache
def _option_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls.__init__)
    return {k: hint for k, hint in hints.items() if k not in ("return", "weight", "children")}


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, member) for member in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if type(value) is int and hint in (int, float):
        return 0 <= value < _LARGEST  # a width, or a number that a float could be
    return type(value) is hint


def install(root: nn.Module, record: Mapping[str, Any]) -> None:
    """Put the named module of a checked record into the tree, with what was there in its hands."""
    parent_path, _, name = record["path"].rpartition(".")
    parent = _at(root, parent_path)
    original = parent._modules.get(name)
    if original is None and (hasattr(parent, name) or record["parameters"] or record["children"]):
        raise LoadError(f"the model has no module {record['path']}", "path")
    if original is not None and is_named(original) and not _is_alike(record, original):
        raise LoadError(f"{record['path']} is another {type(original).__name__}", "options")
    module = _make(record, original)
    if original is not None:
        remember(module, original)
    parent.add_module(name, module)
    for path in record.get("also", ()):
        other, _, name = path.rpartition(".")
        if original is not None and _at(root, other)._modules.get(name) is not original:
            raise LoadError(f"{path} is not the same module as {record['path']}", "also")
        _at(root, other).add_module(name, module)


def _is_alike(record: Mapping[str, Any], named: Any) -> bool:
    return bool(type(named).__name__ == record["class"] and named.options() == record["options"])


def _at(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise LoadError(f"the model has no module {path}", "path") from None


def _make(record: Mapping[str, Any], original: nn.Module | None) -> nn.Module:
    taken: dict[str, Any] = {}
    if original is not None:
        held = original._modules if record["children"] else original._parameters
        names = record["children"] or record["parameters"]
        missing = [name for name in names if held.get(name) is None]
        if missing:
            raise LoadError(f"{record['path']} has no {missing[0]}", "path")
        if record["children"]:
            taken = {"children": {name: held[name] for name in names}}
        elif names:
            taken = {"weight": held[names[0]]}
    try:
        made: nn.Module = CLASSES[record["class"]](**taken, **record["options"])
    except Exception as error:  # options of the right types may still make no sense together
        raise LoadError(f"make no {record['class']}: {error}", "options") from None
    registered = [name for name, p in made._parameters.items() if p is not None]
    if registered != record["parameters"] or list(made._modules) != record["children"]:
        raise LoadError(f"are not those of this {record['class']}", "parameters")
    width = record["options"].get("width")
    for name, tensor in made._parameters.items():
        if tensor is not None and tuple(tensor.shape) != (width,):
            raise LoadError(f"{name} of {record['path']} has {list(tensor.shape)}", "options.width")
    return made


def check_calls(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """LoadError, naming the node, unless widths in options are those that the graph works with."""
    for node in graph.find_nodes(op="call_module"):
        module: Any = modules.get(str(node.target))
        if module is None or not is_named(module):
            continue
        taken = next((arg for arg in node.args if isinstance(arg, fx.Node)), node)
        for name, there in (
            ("width", _width_of(node)),
            ("head_dim", _width_of(taken)),
            ("rotary_dim", getattr(module, "head_dim", None) or _width_of(taken)),
        ):
            said = getattr(module, name, None)
            fits = said == there or (name == "rotary_dim" and (said or 0) <= (there or _LARGEST))
            if None not in (said, there) and not fits:
                raise LoadError(f"{node.target} has {name}={said}, not {there}", node.name)


def _width_of(node: fx.Node) -> int | None:
    """The last size of a node's tensor, where it is a number."""
    spec = node.meta.get("spec")
    last = spec.shape[-1] if spec is not None and spec.shape else None
    return last if isinstance(last, int) else None
