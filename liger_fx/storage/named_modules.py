"""The named modules of a rewritten tree, as records and back.

   LigerRMSNorm((56,), eps=1e-06) at model.norm
<->
   {"path": "model.norm", "class": "LigerRMSNorm", "options": {"width": 56, "eps": 1e-06, ...},
    "parameters": ["weight"], "children": []}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_type_hints

from torch import fx, nn

import liger_fx.modules
from liger_fx.codec import decode, inside, shown
from liger_fx.errors import LoadError
from liger_fx.modules.origin import remember
from liger_fx.storage.records import NamedModule

CLASSES: dict[str, Any] = {
    name: getattr(liger_fx.modules, name) for name in liger_fx.modules.__all__
}
_KINDS = tuple(CLASSES.values())
_LARGEST = 2**24
# Its file needs PEFT, which is there where a model has such a layer.
_ADAPTED = "LigerLoraLinear"


def is_named(module: nn.Module) -> bool:
    """Whether it is one of liger_fx's modules, and no subclass of one."""
    kind = type(module)
    return kind in _KINDS or kind.__module__ == "liger_fx.modules.lora_linear"


def describe(root: nn.Module) -> list[NamedModule]:
    """A record for each named module in the tree's order; ``also`` are its further paths."""
    records: dict[nn.Module, NamedModule] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if not is_named(module):
            continue
        if module in records:
            records[module].also.append(path)
            continue
        records[module] = NamedModule(
            path,
            type(module).__name__,
            module.options(),
            [name for name, p in module._parameters.items() if p is not None],
            list(module._modules),
        )
    return list(records.values())


def check(record: NamedModule) -> None:
    """LoadError for a class or an option that there is not.

    What the record says of the tree is held against it by ``install``.
    """
    if record.class_ not in (*CLASSES, _ADAPTED):
        raise LoadError(f"{shown(record.class_)} is no named module", "class")
    known = {} if record.class_ == _ADAPTED else _option_types(CLASSES[record.class_])
    for name, value in record.options.items():
        if name not in known:
            raise LoadError(f"{record.class_} has no option {shown(name)}", "options")
        with inside(f"options.{name}"):
            decode(known[name], value)
            least = -_LARGEST if name == "ignore_index" else 0
            if type(value) is int and not least <= value < _LARGEST:
                raise LoadError(f"{shown(value)} is no value for it")


@functools.cache
def _option_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls.__init__)
    others = ("return", "weight", "bias", "children", *_own_names(cls))
    return {k: hint for k, hint in hints.items() if k not in others}


@functools.cache
def _own_names(cls: Any) -> tuple[str, ...]:
    """The arguments that are parameters of the model, which have these names there too."""
    return tuple(n for n, hint in get_type_hints(cls.__init__).items() if hint is nn.Parameter)


def install(root: nn.Module, record: NamedModule) -> None:
    """Put the named module of a checked record into the tree, around the weights that are there."""
    parent_path, _, name = record.path.rpartition(".")
    parent = _at(root, parent_path)
    original = parent._modules.get(name)
    if original is None and (hasattr(parent, name) or record.parameters or record.children):
        raise LoadError(f"the model has no module {record.path}", "path")
    if original is not None and is_named(original) and not _is_alike(record, original):
        raise LoadError(f"{record.path} is another {type(original).__name__}", "options")
    module = _make(record, original)
    if original is not None:
        remember(module, original)
    parent.add_module(name, module)
    for path in record.also:
        other, _, name = path.rpartition(".")
        if original is not None and _at(root, other)._modules.get(name) is not original:
            raise LoadError(f"{path} is not the same module as {record.path}", "also")
        _at(root, other).add_module(name, module)


def roles(record: NamedModule) -> dict[str, str]:
    """The parameters that such a module is made with: the argument, and the name in the model."""
    given = {role: record.options.get(f"{role}_name") for role in ("weight", "bias")}
    given |= {name: name for name in _own_names(CLASSES[record.class_])}
    return {role: name for role, name in given.items() if name in record.parameters}


def _is_alike(record: NamedModule, named: Any) -> bool:
    return bool(type(named).__name__ == record.class_ and named.options() == record.options)


def _at(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise LoadError(f"the model has no module {path}", "path") from None


def _make(record: NamedModule, original: nn.Module | None) -> nn.Module:
    if record.class_ == _ADAPTED:
        return _adapted(record, original)
    taken: dict[str, Any] = {}
    if original is not None:
        held = original._modules if record.children else original._parameters
        names = record.children or record.parameters
        missing = [name for name in names if held.get(name) is None]
        if missing:
            raise LoadError(f"{record.path} has no {missing[0]}", "path")
        if record.children:
            taken = {"children": {name: held[name] for name in names}}
        else:
            taken = {role: held[name] for role, name in roles(record).items()}
    try:
        made: nn.Module = CLASSES[record.class_](**taken, **record.options)
    except Exception as error:  # options of the right types may still make no sense together
        raise LoadError(f"make no {record.class_}: {error}", "options") from None
    registered = [name for name, p in made._parameters.items() if p is not None]
    if registered != record.parameters or list(made._modules) != record.children:
        raise LoadError(f"are not those of this {record.class_}", "parameters")
    width = record.options.get("width")
    for name, tensor in made._parameters.items():
        if tensor is None or name in _own_names(CLASSES[record.class_]):
            continue
        if tuple(tensor.shape) != (width,):
            raise LoadError(f"{name} of {record.path} has {list(tensor.shape)}", "options.width")
    return made


def _adapted(record: NamedModule, original: Any) -> nn.Module:
    kind = type(original)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        raise LoadError(f"{record.path} is no linear layer with PEFT's LoRA around it", "path")
    if record.parameters or record.children != list(original._modules):
        raise LoadError(f"are not those of this {record.class_}", "children")
    from liger_fx.modules.lora_linear import LigerLoraLinear

    return LigerLoraLinear.around(original)


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
