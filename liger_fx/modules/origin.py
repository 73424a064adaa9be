"""What stood where a named module is: classes and plain attributes, without weights.

    LigerSwiGLUMLP at model.layers.0.mlp
 ->
    Origin("", LlamaMLP, {"config": ..., ...}), Origin("act_fn", SiLU, {"inplace": False})

A saved graph is bound to a model only where the same stands: its eps and its activation are part of
the graph. And code that asks the named module for what the original had gets it: ``mlp.act_fn``,
``norm.variance_epsilon``.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

_INTERNALS = frozenset(vars(nn.Module()))
_NAME = "_origins"
_HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """A module that is no longer in the tree; ``path`` leads to it from the one replaced."""

    path: str
    cls: type[nn.Module]
    attributes: dict[str, Any]

    def module(self) -> nn.Module:
        """Such a module, without weights and children."""
        made: nn.Module = self.cls.__new__(self.cls)
        nn.Module.__init__(made)
        made.__dict__.update(copy.copy(self.attributes))
        return made

    def shown(self) -> nn.Module:
        """The same to look at: a hook on it is refused, and so is a change of it."""
        made = self.module()
        for name in _HOOKS:
            made.__dict__[name] = self._refuse_hook
        cls: Any = self.cls
        object.__setattr__(made, "__class__", _not_to_be_changed(cls))
        return made

    def _refuse_hook(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(
            f"{self.path} ({self.cls.__name__}) is computed by the named module that stands around "
            "it and is not called: a hook on it would never run. Put the hook on the model before "
            "it is optimised, or exclude the module."
        )


@functools.lru_cache(maxsize=64)
def _not_to_be_changed(cls: Any) -> Any:
    """The class, but for attributes that are set."""

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        if name != "training":
            raise RuntimeError(
                f"This {cls.__name__} is computed by the named module that stands around it: "
                f"{name} set on it would be lost. Set it on the model before it is optimised, put "
                "another module in its place, or exclude the module that it is part of."
            )

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"__setattr__": refuse, **names})


class NamedModule(nn.Module):
    """What all named modules are: it answers for the module that it replaced.

    is_called_alike: whether graphs call it with what the replaced module took, for what that gave:
    else no graph serves where a hook stands on it, which would be given something else.
    """

    is_called_alike = True

    def _tensor(self, name: str) -> torch.Tensor | None:
        """The parameter of that name, or what has taken its place: a buffer, what pruning or a
        parametrisation computes."""
        held = self._parameters
        found: torch.Tensor | None = held[name] if name in held else getattr(self, name)
        return found

    def __getattr__(self, name: str) -> Any:
        # What a module holds is looked for before: this is asked for parameters and children, too.
        for group in ("_parameters", "_buffers", "_modules"):
            held = self.__dict__.get(group, ())
            if name in held:
                return held[name]
        for origin in origins(self):
            if not origin.path and name in origin.attributes:
                return origin.attributes[name]
            if origin.path == name:
                return origin.shown()
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_of_original(self, name):
            turn_back(self)
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)


def remember(named: nn.Module, original: nn.Module) -> None:
    """Note with ``named`` what it replaces: ``original``, and below it what is not kept."""
    if named is original:  # another call of a module that was replaced already
        return
    kept = set(named.modules())
    found: list[Origin] = []
    for path, module in original.named_modules():
        if module in kept:
            continue
        if _NAME in vars(module):  # a named module itself
            inner = origins(module)
            found += [Origin(f"{path}.{o.path}".strip("."), o.cls, o.attributes) for o in inner]
        else:
            found.append(Origin(path, type(module), plain_attributes(vars(module))))
    vars(named)[_NAME] = tuple(found)


def _is_of_original(named: nn.Module, name: str) -> bool:
    """Whether the attribute is one that the replaced module had, or its class, and the named one
    has not."""
    held = vars(named)
    groups = (held, *(held.get(group, {}) for group in ("_parameters", "_buffers", "_modules")))
    if any(name in group for group in groups):
        return False
    is_new = not hasattr(type(named), name)
    return any(
        name == origin.path
        if origin.path
        else name in origin.attributes or (is_new and hasattr(origin.cls, name))
        for origin in origins(named)
    )


def turn_back(named: nn.Module) -> None:
    """Make a named module, where it stands, the module again that it replaced, with the weights,
    children, hooks and mode that it has now."""
    # A write of nothing new, as PyTorch sees any: a trace whose code does this takes it back.
    unchanged: Any = origins(named)
    nn.Module.__setattr__(named, _NAME, unchanged)
    original, *inner = origins(named)
    held: Any = vars(named)
    for name in held.keys() - _INTERNALS:
        del held[name]
    parameters = held["_parameters"]
    for name in [name for name, parameter in parameters.items() if parameter is None]:
        del parameters[name]
    held.update(copy.copy(original.attributes))
    named.__class__ = original.cls
    for origin in inner:
        path, _, name = origin.path.rpartition(".")
        named.get_submodule(path).add_module(name, origin.module())


def as_original(named: nn.Module) -> nn.Module:
    """Another module: what the named one replaced, with the weights, children, hooks and mode that
    it has now."""
    made = copy.copy(named)
    for group in ("_parameters", "_buffers", "_modules"):
        vars(made)[group] = vars(made)[group].copy()
    turn_back(made)
    return made


def origins(named: nn.Module) -> tuple[Origin, ...]:
    """What the named module replaces; nothing for one that was mounted beside."""
    found: tuple[Origin, ...] = vars(named).get(_NAME, ())
    return found


def plain_attributes(held: dict[str, Any]) -> dict[str, Any]:
    """Of a module's ``__dict__``, what is no tensor, no module and nothing of PyTorch's own, nor a
    hook of accelerate's, which takes its hooks off where it finds them."""
    left_out = _INTERNALS | {"_hf_hook", "_old_forward"}
    if "_hf_hook" in held or _is_its_class_s(held.get("forward")):
        left_out |= {"forward"}  # accelerate's, or what it leaves
    return {
        name: value
        for name, value in held.items()
        if name not in left_out and not isinstance(value, (torch.Tensor, nn.Module))
    }


def _is_its_class_s(forward: Any) -> bool:
    if not isinstance(forward, MethodType):
        return False
    return forward.__func__ is getattr(type(forward.__self__), "forward", None)
