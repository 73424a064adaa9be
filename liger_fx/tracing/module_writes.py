"""What the model's code does to modules and takes back: a hook, another child, a mode.

   handle = self.base.norm.register_forward_hook(steer); self.base(ids); handle.remove()
   self.base.scaling = 2.0; self.base(ids); self.base.scaling = 1.0
->
   a graph would call self.base as it is before and after: who calls it so is refused
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.tree_state import groups_of, hooks_of, is_capturing
from liger_fx.tracing.walk import modules_by_path

_MISSING = object()


class ModuleWrites:
    """The attributes that a trace's code wrote so far, as they were, and the hooks that it put."""

    def __init__(self) -> None:
        self._first_hook = RemovableHandle.next_id
        self._were: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        self._hooks: list[tuple[dict[int, Any], int]] = []

    def note(self, module: nn.Module, name: str) -> None:
        """The attribute, a child's or a tensor's name, is about to be written or deleted."""
        place = id(module), name
        if place not in self._were:
            group = _group_with(module, name)
            self._were[place] = module, _MISSING if group is None else group[name]

    def found_in(self, called: nn.Module) -> str | None:
        """What a module, or one inside it, has at the moment that it had not when the trace began,
        in words."""
        is_hooked = RemovableHandle.next_id != self._first_hook
        changed = [
            (m, name) for (_, name), (m, was) in self._were.items() if _differs(m, name, was)
        ]
        if not is_hooked and not changed:
            return None
        for path, module in modules_by_path(called).items():
            where = path or "itself"
            for owner, name in changed:
                if owner is module:
                    return f"{name} of {where} is changed for the call"
            if found := [*self._new_hooks(module)]:
                self._hooks += found
                return f"a hook is put on {where} for the call"
        return None

    def _new_hooks(self, module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
        for hooks in hooks_of(module):
            for number, hook in hooks.items():
                if number >= self._first_hook and not is_capturing(hook):
                    yield hooks, number

    def undo(self) -> None:
        """Put everything back, also where an exception kept the code from doing so."""
        for (_, name), (module, was) in self._were.items():
            if not _differs(module, name, was):
                continue
            if was is _MISSING:
                delattr(module, name)
            else:
                setattr(module, name, was)
        for hooks, number in self._hooks:
            hooks.pop(number, None)


def _group_with(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The dictionary of the module in which there is something of that name."""
    return next((g for g in (module.__dict__, *groups_of(module)) if name in g), None)


def _differs(module: nn.Module, name: str, was: Any) -> bool:
    group = _group_with(module, name)
    now = _MISSING if group is None else group[name]
    return now is not was and not (isinstance(was, PLAIN) and type(was) is type(now) and was == now)
