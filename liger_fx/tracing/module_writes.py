"""What the model's code does to modules and takes back: a hook, another child, a mode.

   handle = self.base.norm.register_forward_hook(steer); self.base(ids); handle.remove()
   self.base.scaling = 2.0; self.base(ids); self.base.scaling = 1.0
->
   a graph would call self.base as it is before and after: who calls it so is refused
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.tree_state import groups_of, hooks_of, is_capturing, is_named
from liger_fx.tracing.walk import module_at, modules_by_path

_MISSING, _UNKNOWN = object(), object()


class ModuleWrites:
    """The attributes that a trace's code wrote so far, as they were, and the hooks that it put."""

    def __init__(self) -> None:
        self._were: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        self._named: dict[int, tuple[nn.Module, type, dict[str, Any]]] = {}
        self._handles: dict[int, tuple[RemovableHandle, Any]] = {}

    def note(self, module: nn.Module, name: str) -> None:
        """The attribute, a child's or a tensor's name, is about to be written or deleted."""
        place = id(module), name
        if is_named(module) or id(module) in self._named:  # which may become what it replaced
            held = {k: copy.copy(v) if type(v) is dict else v for k, v in vars(module).items()}
            self._named.setdefault(id(module), (module, type(module), held))
        if place not in self._were:
            group = _group_with(module, name)
            self._were[place] = module, _MISSING if group is None else group[name]

    def note_hook(self, handle: RemovableHandle, by: Any) -> None:
        """A hook was put on a module, or on a tensor; ``by`` whom, for ``who_left_hooks``."""
        self._handles[handle.id] = handle, by

    def who_left_hooks(self, modules: Iterable[nn.Module]) -> Any:
        """Who put a hook on one of these that is there still; None if nobody did."""
        if self._handles:
            for module in modules:
                for hooks in hooks_of(module):
                    for number in self._handles.keys() & hooks.keys():
                        if not is_capturing(hooks[number]):
                            return self._handles[number][1]
        return None

    def is_swapped(self, root: nn.Module, path: str) -> bool:
        """Whether another module hangs at that path, or around it, than when the trace began."""
        if not self._were:
            return False
        names = path.split(".")
        owners = (module_at(root, ".".join(names[:i])) for i in range(len(names)))
        for owner, name in zip(owners, names, strict=True):
            _, was = self._were.get((id(owner), name), (owner, _UNKNOWN))
            if owner is not None and was is not _UNKNOWN and _differs(owner, name, was):
                return True
        return False

    def found_in(self, called: nn.Module) -> str | None:
        """What a module, or one inside it, has at the moment that it had not when the trace began,
        in words."""
        changed = [
            (m, name) for (_, name), (m, was) in self._were.items() if _differs(m, name, was)
        ]
        if not self._handles and not changed:
            return None
        for path, module in modules_by_path(called).items():
            where = path or "itself"
            for owner, name in changed:
                if owner is module:
                    return f"{name} of {where} is changed for the call"
            hooks = (item for hooks in hooks_of(module) for item in hooks.items())
            if any(n in self._handles and not is_capturing(hook) for n, hook in hooks):
                return f"a hook is put on {where} for the call"
        return None

    def undo(self) -> None:
        """Put everything back, also where an exception kept the code from doing so."""
        for module, kind, held in self._named.values():
            object.__setattr__(module, "__class__", kind)
            vars(module).clear()
            vars(module).update(held)
        for (_, name), (module, was) in self._were.items():
            if id(module) in self._named or not _differs(module, name, was):
                continue
            if was is _MISSING:
                delattr(module, name)
            else:
                setattr(module, name, was)
        for number, (handle, _) in self._handles.items():
            hooks = handle.hooks_dict_ref() or {}
            if number in hooks and not is_capturing(hooks[number]):
                handle.remove()


def _group_with(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The dictionary of the module in which there is something of that name."""
    return next((g for g in (module.__dict__, *groups_of(module)) if name in g), None)


def _differs(module: nn.Module, name: str, was: Any) -> bool:
    group = _group_with(module, name)
    now = _MISSING if group is None else group[name]
    return now is not was and not (isinstance(was, PLAIN) and type(was) is type(now) and was == now)
