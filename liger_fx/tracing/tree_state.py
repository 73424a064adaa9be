"""What a graph assumes of the module tree it runs in, compared at every call in a few microseconds.

model.eval(); model.model.layers[0].train()    ->  one mode differs: another graph must serve
model.to(torch.bfloat16)                       ->  the dtypes differ
model.config.output_attentions = True          ->  the config differs
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from liger_fx.tracing.check import Check
from liger_fx.tracing.dispatched import moves_nothing
from liger_fx.tracing.guards import Guards, TensorFacts, layout_of
from liger_fx.tracing.walk import module_at, modules_by_path

# Looked up when the graph runs, so it may change.
_ATTENTION = ("_attn_implementation_internal", "_attn_implementation")


Modules = dict[str, nn.Module]
# The hooks that stand on all modules of the process.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)
Kind = tuple[torch.dtype, torch.device]
Place = tuple[str | int, ...]  # a module's path, then attributes and items down to a config


@dataclass(frozen=True)
class TreeFacts:
    """What a module tree was like when its graph was made.

    kinds: dtypes and devices of the parameters that tell what the graph's frozen casts mean.
    configs: the values of each config. A config in another has a place of its own.
    checkpointed: whether gradient checkpointing is on, which the code of a model asks. (A layer
    that is checkpointed is called as it is.)
    classes: those of the modules whose code the graph replaces. called: those of the modules that
    it calls as they are.
    """

    kinds: dict[str, Kind]
    configs: dict[Place, dict[str, Any]]
    checkpointed: dict[str, bool] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)
    called: dict[str, type] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module, modules: Modules, called: Modules) -> TreeFacts:
        """The facts of ``root`` now; ``modules`` are those whose code the graph replaces."""
        kinds = {path: (t.dtype, t.device) for path, t in telling_parameters(root).items()}
        configs = {
            place: copy.deepcopy({k: v for k, v in vars(config).items() if not _holds_config(v)})
            for place, config in configs_of(modules).items()
        }
        checkpointed = {
            path: bool(module.gradient_checkpointing)
            for path, module in modules.items()
            if hasattr(module, "gradient_checkpointing")
            and not isinstance(module, GradientCheckpointingLayer)
        }
        classes = {path: class_of(module) for path, module in modules.items()}
        called_ones = {path: class_of(module) for path, module in called.items()}
        return cls(kinds, configs, checkpointed, classes, called_ones)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class ModuleFacts(NamedTuple):
    """What hung on a module whose code was followed, which may ask for any of it.

    names: of its modules, parameters and buffers, and which of them were None; without named
    modules, which are put there for the graphs.
    """

    names: tuple[dict[str, bool], ...]

    @classmethod
    def of(cls, modules: Modules) -> dict[str, ModuleFacts]:
        """Those of the modules as they are now, and of the lists and dictionaries in them."""
        held = {
            f"{path}.{name}".lstrip("."): child
            for path, module in modules.items()
            for name, child in module._modules.items()
            if isinstance(child, _CONTAINERS)
        }
        return {path: cls(_names_on(module)) for path, module in (modules | held).items()}

    def add_to(self, check: Check, module: nn.Module) -> None:
        """Add that it is so still."""
        counts = [len(group) for group in groups_of(module)]
        for group, count, names in zip(groups_of(module), counts, self.names, strict=True):
            condition = "len({}) == {} or {}()"
            check.add(condition, group, count, functools.partial(self._holds, module))
            for name, is_none in names.items():
                if is_none:
                    check.add("{}.get({}) is None", group, name)
        if not self._holds(module):
            check.add("False")

    def _holds(self, module: nn.Module) -> bool:
        now = _names_on(module)
        if isinstance(module, _CONTAINERS):
            return now == self.names
        # What a graph calls and is gone it names itself, as it runs.
        return all(a.items() <= then.items() for a, then in zip(now, self.names, strict=True))


def groups_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where PyTorch keeps the children, parameters and buffers of a module."""
    held = module.__dict__
    return held["_modules"], held["_parameters"], held["_buffers"]


def is_named(held: Any) -> bool:
    """Whether it is a named module, which stands for another and answers for it."""
    kind = type(held)
    found = _NAMED.get(kind)
    if found is None:
        found = any(c.__module__.startswith("liger_fx.modules") for c in kind.__mro__)
        _NAMED[kind] = found
    return found


_NAMED: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _names_on(module: nn.Module) -> tuple[dict[str, bool], ...]:
    return tuple(
        {name: held is None for name, held in group.items() if not is_named(held)}
        for group in groups_of(module)
    )


class Tree(NamedTuple):
    """The tree that a graph is to run in.

    modules: those whose code the graph replaces. places: where they, the blocks that it calls and
    what is around these hang.
    """

    root: nn.Module
    modules: Modules
    facts: TreeFacts
    guards: Guards
    places: list[tuple[dict[str, Any], str]]
    members: Mapping[str, ModuleFacts]

    @classmethod
    def of(
        cls,
        root: nn.Module,
        modules: Modules,
        facts: TreeFacts,
        guards: Guards,
        places: Iterable[str],
        members: Mapping[str, ModuleFacts],
    ) -> Tree:
        """``places`` are those of ``places_of``."""
        groups = [_group_of(root, path, "_modules") for path in places]
        return cls(root, modules, facts, guards, groups, members)


def places_of(paths: Iterable[str]) -> list[str]:
    """Where modules at these paths hang, and what is around them: a list of layers may be cut."""
    return sorted({above for path in paths if path for above in _and_above(path)})


def add_facts(check: Check, tree: Tree) -> None:
    """Add that the tree is the one of its facts: classes, dtypes, devices and configs."""
    root, modules, facts, guards, places, _ = tree
    now = configs_of(modules)
    classes = {path: class_of(module) for path, module in modules.items()}
    gone = any(group.get(name) is None for group, name in places)
    if gone or classes != facts.classes or not now.keys() >= facts.configs.keys():
        check.add("False")
    _add_called(check, root, facts.called)
    # Looked up by name at each check: a parameter may be replaced.
    for path, (dtype, device) in facts.kinds.items():
        group, name = _group_of(root, path)
        condition = "(t := {}.get({})) is not None and t.dtype is {} and t.device == {}"
        check.add(condition, group, name, dtype, device)
    _add_tensors(check, root, guards.tensors)
    unguarded = () if guards.attention_fixed else _ATTENTION
    for place, then in facts.configs.items():
        if place in now:
            config = _ConfigState.shared(now[place], then, unguarded)
            check.add("{} == {} or {}()", config.now, config.then, config.holds)


def _add_called(check: Check, root: nn.Module, classes: Mapping[str, type]) -> None:
    """Add that what the graph calls is what it was, or one of the same class in its place. (What is
    gone the graph names itself, as it runs.)"""
    for path, then in classes.items():
        group, name = _group_of(root, path, "_modules")
        if (module := group.get(name)) is None:
            continue
        now = class_of(module)
        if not (issubclass(now, then) if is_named(module) else now is then):
            check.add("False")
        check.add("{}[{}] is {}", group, name, module)
        if is_named(module):  # which may become again what it replaced
            check.add("{}.__class__ is {}", module, type(module))


def _add_tensors(check: Check, root: nn.Module, asked: TensorFacts) -> None:
    for found, attribute in ((asked.shapes, "shape"), (asked.dtypes, "dtype")):
        for path, value in found.items():
            condition = f"getattr({{}}.get({{}}), '{attribute}', None) == {{}}"
            check.add(condition, *_group_of_tensor(root, path), value)
    for path, layout in asked.layouts.items():
        check.add("{}({}.get({})) == {}", layout_of, *_group_of_tensor(root, path), layout)
    for path, cls in asked.classes.items():
        check.add("type({}.get({})) is {}", *_group_of_tensor(root, path), cls)
    for path, on in asked.trained.items():
        condition = f"getattr({{}}.get({{}}), 'requires_grad', None) is {on}"
        check.add(condition, *_group_of_tensor(root, path))


def _group_of_tensor(root: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds the parameter, buffer or plain tensor at ``path``."""
    owner, _, name = path.rpartition(".")
    module = module_at(root, owner)
    groups = (module._parameters, module._buffers, module.__dict__)
    return next((group for group in groups if name in group), {}), name


def add_state(check: Check, tree: Tree) -> None:
    """Add what ``add_facts`` adds, the modes and hooks of the tree's modules, and that they and the
    blocks that the graph calls hang where they hung."""
    add_facts(check, tree)
    root, modules, facts, guards, places, _ = tree
    # The root's own hooks run around the graph, as around any forward.
    inside = [m for m in modules.values() if m is not root]
    called = (module_at(root, path) for path in facts.called)
    others = [m for m in called if m is not None and not getattr(m, "is_called_alike", True)]
    add_no_hooks(check, inside + others)
    for module in others:
        check.add("'forward' not in {}", module.__dict__)
    for module in inside:
        own_forward = functools.partial(moves_nothing, module, root)
        condition = "{}.__class__ is {} and ('forward' not in {} or {}())"
        check.add(condition, module, type(module), module.__dict__, own_forward)
    for path, mode in asked_modes(root, modules, guards):
        check.add(f"{{}}['training'] is {mode}", modules[path].__dict__)
    for path, on in facts.checkpointed.items():
        if path in modules:
            held = modules[path].__dict__
            check.add(f"{{}}.get('gradient_checkpointing', False) is {on}", held)
    for path, members in tree.members.items():
        if (module := module_at(root, path)) is not None:
            members.add_to(check, module)
    # A module that is exchanged for another has code that was not traced.
    for group, name in places:
        check.add("{}[{}] is {}", group, name, group.get(name))


def add_no_hooks(check: Check, modules: list[nn.Module]) -> None:
    """Add that no hook stands on these modules, or on all modules of the process."""
    hooks = _Hooks(modules)
    check.add("{}.next_id == {}.seen or {}()", RemovableHandle, hooks, hooks.none)


def add_configs(check: Check, modules: Modules) -> None:
    """Add that the configs of these modules keep all their values."""
    for config in configs_of(modules).values():
        then = copy.deepcopy({k: v for k, v in vars(config).items() if not _holds_config(v)})
        state = _ConfigState(config, then, ())
        check.add("{} == {}", state.now, state.then)


class _Hooks:
    """Whether hooks stand on modules, or on all modules of the process.

    PyTorch numbers all hooks of the process: while the number stands, no new one does.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.hooks = [*GLOBAL_HOOKS, *(hooks for m in modules for hooks in hooks_of(m))]
        self.seen = -1

    def none(self) -> bool:
        number = RemovableHandle.next_id
        if all(is_capturing(hook) for hooks in self.hooks for hook in hooks.values()):
            self.seen = number
            return True
        return False


def asked_modes(root: nn.Module, modules: Modules, guards: Guards) -> list[tuple[str, bool]]:
    """The modules whose code asks for their mode, by path, and what it must be."""
    asking = (path for path, m in modules.items() if m is root or asks_mode(m))
    return [(path, guards.training is not (path in guards.other_mode)) for path in asking]


def plain_configs(
    root: nn.Module, facts: TreeFacts, guards: Guards
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The root's own config, and those in it, by their attributes' path: the plain values that a
    graph of it assumes."""
    for (path, *steps), values in facts.configs.items():
        if path == "" and all(map(_is_identifier, steps)):
            unguarded = () if guards.attention_fixed else _ATTENTION
            plain = (bool, int, float, str, type(None))
            kept = {
                name: value
                for name, value in values.items()
                if isinstance(value, plain) and name not in unguarded
            }
            yield ".".join(("config", *map(str, steps))), kept


def _is_identifier(step: str | int) -> bool:
    return isinstance(step, str) and step.isidentifier()


def class_of(module: Any) -> Any:
    """The module's class; of a block, the class of the module that it was made from."""
    return getattr(type(module), "block_class", type(module))


def telling_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters whose dtype decides what the graph's frozen casts mean, by path.

    All but those of linear layers, which raise by themselves at an input of another dtype; up to a
    handful of each class: a model changes dtype as a whole or by kind of module, and a deep one
    must not pay for every layer.
    """
    counts: Counter[tuple[type, str]] = Counter()
    found: dict[str, nn.Parameter] = {}
    for path, module in modules_by_path(root).items():
        for name, tensor in module._parameters.items():
            kind = (type(module), name)
            counts[kind] += 1
            most = 1 if isinstance(module, nn.Linear) else 8
            if tensor is not None and counts[kind] <= most:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _and_above(path: str) -> Iterator[str]:
    """The path, and those of the modules around it."""
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _group_of(root: nn.Module, path: str, group: str = "_parameters") -> tuple[dict[str, Any], str]:
    """The dictionary that holds the parameter (or module) at ``path``, empty if there is no such
    module."""
    owner, _, name = path.rpartition(".")
    holder = module_at(root, owner)
    return {} if holder is None else getattr(holder, group), name


class _ConfigState:
    """A config's values as they were, but for those named in ``unguarded``."""

    def __init__(self, config: Any, then: dict[str, Any], unguarded: tuple[str, ...]) -> None:
        self.config, self.values, self.unguarded = config, then, unguarded
        self.now = vars(config)
        # Nested configs are guarded on their own, and are compared here by identity.
        self.then = {**then, **_configs_on(config)}

    @classmethod
    def shared(cls, config: Any, then: dict[str, Any], unguarded: tuple[str, ...]) -> _ConfigState:
        """One for the checks of all layers: a step then finds it near at hand in each."""
        key = id(config), id(then), unguarded, *map(id, _configs_on(config).values())
        found = _SHARED.get(key)
        if found is None:
            found = _SHARED[key] = cls(config, then, unguarded)
        return found

    def holds(self) -> bool:
        if self.now == self.then:
            return True
        missing = object()
        return all(
            self.now.get(name, missing) == self.then.get(name, missing)
            for name in self.now.keys() | self.then.keys()
            if name not in self.unguarded
        )


# While a state lives, so does all that its key names.
_SHARED: weakref.WeakValueDictionary[Any, _ConfigState] = weakref.WeakValueDictionary()


def _configs_on(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if _holds_config(value)}


def configs_of(modules: Modules) -> dict[Place, Any]:
    """The configs of these modules and all configs nested in them, once each."""
    found: dict[Place, Any] = {}
    seen: set[int] = set()
    pending: list[tuple[Place, Any]] = [
        ((path,), module.config)
        for path, module in modules.items()
        if "config" in module.__dict__ or hasattr(type(module), "config")
    ]
    for place, config in pending:  # grows while it is walked
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            found[place] = config
            pending += _configs_in(vars(config), place)
    return found


_MAY_HOLD_CONFIGS = (PreTrainedConfig, dict, list, tuple)


def _configs_in(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, PreTrainedConfig):
        yield place, value
    elif isinstance(value, (dict, list, tuple)):
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(item, _MAY_HOLD_CONFIGS):
                yield from _configs_in(item, (*place, key))


def _holds_config(value: Any) -> bool:
    return isinstance(value, _MAY_HOLD_CONFIGS) and any(True for _ in _configs_in(value, ()))


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What runs before and after a module's forward and backward, by kind of hook."""
    held = module.__dict__
    return (
        held["_forward_hooks"],
        held["_forward_pre_hooks"],
        held["_backward_hooks"],
        held["_backward_pre_hooks"],
    )


# What transformers notes on a model as it installs its own hooks for output_hidden_states.
CAPTURING = "_output_capturing_hooks_installed"


def is_capturing(hook: Any) -> bool:
    """Whether it is transformers' own hook for output_hidden_states, idle unless asked for."""
    return "output_capturing_hook" in getattr(hook, "__qualname__", "")


def asks_mode(module: nn.Module) -> bool:
    """Whether the code of the module (PyTorch's own aside) uses its mode."""
    kind = type(module)
    found = _ASKS_MODE.get(kind)
    if found is None:
        found = _ASKS_MODE[kind] = _code_mentions(kind, "training")
    return found


_ASKS_MODE: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _code_mentions(cls: type, name: str) -> bool:
    """Whether a method of the class (PyTorch's own aside) uses an attribute of that name."""
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            continue
        for value in vars(base).values():
            code = getattr(getattr(value, "__wrapped__", value), "__code__", None)
            if code is not None and name in code.co_names:
                return True
    return False
