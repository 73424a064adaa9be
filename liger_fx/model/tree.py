"""A second tree of the same modules around the same weights: the given model stays as it is.

    LlamaForCausalLM(model, lm_head)
 ->
    LlamaForCausalLM'(model', lm_head')   with   lm_head'.weight is lm_head.weight

Classes, names, parameters and buffers are the same objects; containers, hooks, modes and configs
are not.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.tree_state import class_of
from liger_fx.tracing.walk import modules_by_path

_PLAIN = frozenset(PLAIN)
_PLAIN_DICTS = (dict, OrderedDict)  # copy.copy takes many times as long
_OWN_DICTS = frozenset(n for n, v in vars(nn.Module()).items() if type(v) in _PLAIN_DICTS)
Bare = Callable[[nn.Module], nn.Module]


def bare_module(module: nn.Module) -> nn.Module:
    """A module of the same class without any attributes."""
    return module.__class__.__new__(module.__class__)


def plain_module(module: nn.Module) -> nn.Module:
    """The same, of the original's class for a block."""
    kind = class_of(module)
    made: nn.Module = kind.__new__(kind)
    return made


def copy_tree(
    model: nn.Module, bare: Bare = bare_module, instead: Mapping[int, Any] | None = None
) -> Any:
    """A copy of every module of ``model``, sharing its parameters and buffers; no memory for
    weights. ``bare`` makes what a module becomes, without attributes; ``instead`` are other
    modules and tensors to take, by the identity of those that they stand for."""
    known: dict[int, Any] = dict(instead or {})
    copies = {
        module: bare(module)
        for module in modules_by_path(model).values()
        if id(module) not in known
    }
    configs: dict[int, Any] = {}
    known.update((id(module), twin) for module, twin in copies.items())
    for module, twin in copies.items():
        attributes = twin.__dict__
        for name, value in module.__dict__.items():
            kind = type(value)
            # Most are: no hooks, which no two modules share.
            if kind in _PLAIN_DICTS and name in _OWN_DICTS and not value:
                attributes[name] = kind()
                continue
            if kind in _PLAIN:
                attributes[name] = value
                continue
            if name == "_block":  # what a block is besides its module is not copied
                continue
            if name == "config" or name.endswith("_config"):
                # One copy for all that share a config, modules and other configs: what is set on
                # it, all of them see.
                attributes[name] = copy.deepcopy(value, configs)
            else:
                attributes[name] = _copied(value, known)
    return copies[model]


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """The copy of a module or container, down to the containers in it; a function that is bound to
    a module, as accelerate's hooks are, bound to its copy; anything else as it is."""
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    if isinstance(value, dict):
        twin = known[id(value)] = value.copy() if kind in _PLAIN_DICTS else copy.copy(value)
        for key, item in value.items():
            twin[key] = _copied(item, known)
        return twin
    if kind is list:
        items: list[Any] = []
        known[id(value)] = items
        items += (_copied(item, known) for item in value)
        return items
    if kind in (tuple, set):
        twin = kind(_copied(item, known) for item in value)
        return twin
    if kind is FunctionType and any(id(m) in known for m in _modules_closed_over(value)):
        return _with_copies(value, known)
    if kind is MethodType:
        owner, function = value.__self__, value.__func__
        name = getattr(function, "__name__", "")  # a partial function has none
        copied: Any = _copied(owner, known)
        # A method of its class: the copy's own, which for a block runs its graph.
        is_own = getattr(type(owner), name, None) is function
        return MethodType(getattr(type(copied), name) if is_own else function, copied)
    if kind is functools.partial:
        args = [_copied(item, known) for item in value.args]
        bound = functools.partial(value.func, *args, **_copied(value.keywords, known))
        known[id(value)] = bound
        bound.__dict__.update(_copied(value.__dict__, known))
        return bound
    return value


def _modules_closed_over(function: FunctionType) -> list[nn.Module]:
    cells = (cell for cell in function.__closure__ or () if cell != CellType())
    return [m for cell in cells if isinstance(m := cell.cell_contents, nn.Module)]


def _with_copies(function: FunctionType, known: dict[int, Any]) -> FunctionType:
    """The function, a model's own hook, with the copies of the modules that it closes over."""
    modules = {id(m) for m in _modules_closed_over(function)}
    cells = []
    for cell in function.__closure__ or ():
        held = None if cell == CellType() else cell.cell_contents
        cells.append(CellType(known.get(id(held), held)) if id(held) in modules else cell)
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    functools.update_wrapper(made, function, updated=("__dict__",))
    del made.__dict__["__wrapped__"]
    made.__kwdefaults__ = function.__kwdefaults__
    return made
