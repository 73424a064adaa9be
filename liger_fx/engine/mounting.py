"""Where a named module goes: in the place of the module it replaces, or beside, as a new child.

    model.layers.0.input_layernorm   LlamaRMSNorm    ->  LigerRMSNorm           (takes the place)
    model.layers.0.self_attn         LlamaAttention  ->  ... + rotary_embedding (mounted beside)

A module takes another's place when the match covers everything that the other computes, in each of
its calls, and the keys of the state_dict stay as they are.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from liger_fx.engine.facts import Facts, computes
from liger_fx.engine.legality import check_effects, check_later_writes, check_readers
from liger_fx.engine.match import Match
from liger_fx.engine.matcher import find
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import describe
from liger_fx.engine.terms import Terms
from liger_fx.engine.writes import Writes
from liger_fx.modules.origin import remember
from liger_fx.tracing.effects import is_effectful
from liger_fx.tracing.trace import ModuleCall
from liger_fx.tracing.walk import modules_by_path

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # a new child would change what they do


@dataclass(frozen=True)
class Plan:
    """What to put where a match stands.

    path: of the module that the site is reported under. owner: the one whose place is taken, if so.
    """

    replacement: Replacement
    path: str
    owner: Owner | None


class Mounting:
    """Decides for one rule, and carries out on the tree of modules."""

    def __init__(self, rule: Rule, facts: Facts, view: Terms) -> None:
        self.rule, self.facts, self.view = rule, facts, view
        self.writes = Writes(facts)
        self._taken: dict[str, nn.Module | None] = {}
        self._homes: dict[int, list[tuple[nn.Module, str]]] | None = None

    def plan(self, match: Match) -> Plan:
        """Raises Reject when the rule has no module for this match."""
        try:
            owner, replacement = self._in_place_of(match)
            return Plan(replacement, owner.path, owner)
        except Reject as why:
            beside = self.rule.build(match, None)
            if beside is None:
                raise why from None
            check_later_writes(match, beside, self.writes)
        return Plan(beside, self.holder(match), None)

    def holder(self, *matches: Match) -> str:
        """The innermost module that can hold a new child and whose calls made all the nodes."""
        nodes = [n for m in matches for n in (*m.covered, m.root) if computes(n)]
        call = self.facts.innermost_holding(nodes or [matches[0].root])
        while call.parent is not None and isinstance(self.facts.module(call.path), _CONTAINERS):
            call = self.facts.trace.calls[call.parent]
        return call.path

    # -- taking a place ----------------------------------------------------------------------------

    def _in_place_of(self, match: Match) -> tuple[Owner, Replacement]:
        owner, args = self._owner(match)
        replacement = self._fitting(match, owner, args)
        check_later_writes(match, replacement, self.writes)
        if owner.path not in self._taken:
            self._taken[owner.path] = replacement.module
            if not self._every_call_is_alike(owner, match):
                self._taken[owner.path] = None
        module = self._taken[owner.path]
        if module is None:
            raise Reject(f"other calls of {owner.path} do something else", match.root)
        return owner, replace(replacement, module=module)

    def _owner(self, match: Match) -> tuple[Owner, tuple[Any, ...]]:
        """The module that computes the match and nothing else, and what it was called with."""
        root = match.root
        if root.op == "call_module" and set(match.covered) <= {root, *match.outside}:
            return Owner(str(root.target), self.facts.module(str(root.target))), self._arguments(
                root
            )
        call = self.facts.call(root)
        for node in match.covered:
            inner = self.facts.call(node)
            if node in match.outside or not computes(node):
                continue
            if not self.facts.is_inside(inner, call):
                raise Reject(
                    f"its parts sit in different modules, {inner.path} and {call.path}", node
                )
        name = call.cls.__name__
        if self.facts.output(call) is not root:
            after = next((node for node in root.users if self.facts.call(node) is call), root)
            raise Reject(f"{name} goes on after it", after)
        covered = {*match.covered, root}
        for node in self.facts.nodes_below(call):
            if node not in covered and _counts(node):
                raise Reject(f"{name} computes more than that: {describe(node)}", node)
        if call.parent is None:
            raise Reject("it is the whole model", root)
        if asked := _asked(self.facts, call):
            raise Reject(f"{name} asks {asked}", root)
        return Owner(call.path, self.facts.module(call.path)), self._arguments(call)

    def _arguments(self, call: ModuleCall | fx.Node) -> tuple[Any, ...]:
        if call.kwargs:
            node = call if isinstance(call, fx.Node) else None
            raise Reject("it is called with arguments by name", node)
        return tuple(self.facts.now(a) if isinstance(a, fx.Node) else a for a in call.args)

    def _fitting(self, match: Match, owner: Owner, args: tuple[Any, ...]) -> Replacement:
        replacement = self.rule.build(match, owner)
        if replacement is None:
            raise Reject("there is no named module for it", match.root)
        given = replacement.inputs if replacement.called_with is None else replacement.called_with
        if tuple(term.node and self.facts.now(term.node) for term in given) != args:
            raise Reject(f"{type(owner.module).__name__} is called with something else", match.root)
        old, new = _names_of_state(owner.module), _names_of_state(replacement.module)
        if old != new:
            extra = ", ".join(sorted(old ^ new))
            raise Reject(
                f"{type(owner.module).__name__} holds other parameters: {extra}", match.root
            )
        return replacement

    def _every_call_is_alike(self, owner: Owner, match: Match) -> bool:
        roots = [self.facts.output(call) for call in self.facts.calls_of.get(owner.path, ())]
        roots += [n for n in self.facts.leaf_calls.get(owner.path, ()) if n in self.facts.position]
        return all(root is match.root or self._is_alike(root, owner) for root in roots)

    def _is_alike(self, root: fx.Node | None, owner: Owner) -> bool:
        """Whether another call of the owner, ending in ``root``, would give the same module."""
        if root is None:
            return False
        found = next(find(self.rule.pattern, root, self.view), None)
        if not isinstance(found, Match):
            return False
        try:
            found.found = self.rule.check(found)
            check_readers(found, self.facts)
            check_effects(found, self.facts)
            other, args = self._owner(found)
            replacement = self._fitting(found, other, args)
            check_later_writes(found, replacement, self.writes)
        except Reject:
            return False
        return other.path == owner.path and _equal(replacement.module, self._taken[owner.path])

    # -- on the tree -------------------------------------------------------------------------------

    def put(self, plan: Plan) -> str:
        """Put the plan's module into the tree and return its path."""
        module = plan.replacement.module
        if plan.owner is None:
            return self._mount(plan.path, plan.replacement.name, module)
        module.train(plan.owner.module.training)
        remember(module, plan.owner.module)
        for parent, name in self._places(plan.owner.module):
            parent.add_module(name, module)
        return plan.path

    def _places(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Every place of the tree where the module hangs: tied modules hang in several."""
        if self._homes is None:
            self._homes = defaultdict(list)
            for parent in modules_by_path(self.facts.root).values():
                for name, child in parent._modules.items():
                    self._homes[id(child)].append((parent, name))
        return self._homes.get(id(module), [])

    def _mount(self, holder_path: str, base: str, module: nn.Module) -> str:
        """As ``swiglu``, ``swiglu_2`` ...; an equal module that is there already serves."""
        holder = self.facts.module(holder_path)
        number = 1
        while True:
            name = base if number == 1 else f"{base}_{number}"
            there = getattr(holder, name, None)
            if there is None and not hasattr(holder, name):
                module.train(holder.training)
                holder.add_module(name, module)
            elif not (isinstance(there, nn.Module) and _equal(there, module)):
                number += 1
                continue
            return f"{holder_path}.{name}" if holder_path else name


def _equal(a: Any, b: Any) -> bool:
    """Whether two named modules compute the same, the roles of their layers included. (A rule's
    module that says nothing of its options is known by what it shows.)"""
    return type(a) is type(b) and b is not None and _options(a) == _options(b)


def _options(module: Any) -> Any:
    return module.options() if hasattr(module, "options") else module.extra_repr()


def _counts(node: fx.Node) -> bool:
    """Whether a node belongs to what its module computes: sizes and parameters do not."""
    if node.op in ("get_attr", "placeholder"):
        return False
    return "spec" in node.meta or is_effectful(node) or computes(node)


def _asked(facts: Facts, call: ModuleCall) -> str | None:
    """What the code of the call's modules asks that may have another answer in another call, which
    the trace of that one would no longer see; None for nothing."""
    for inner in facts.calls_below(call):
        code = getattr(inspect.unwrap(inner.cls.forward), "__code__", None)  # type: ignore[attr-defined]
        names: set[str] = set(() if code is None else code.co_names)
        if "training" in names:
            return "whether it is training"
        if "len" in names and names & {"shape", "size"}:
            return "how many dimensions there are"
        if inner.asks:
            return min(inner.asks)
    return None


def _names_of_state(module: nn.Module) -> set[str]:
    """The names in its state_dict, which is not asked: hooks of FSDP2 on it shard the weights, also
    of a layer that is being run."""
    names = set[str]()
    for path, part in modules_by_path(module, every_place=True).items():
        held = {**part._parameters, **part._buffers}
        own = {n for n, tensor in held.items() if tensor is not None}
        own -= part._non_persistent_buffers_set
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            own.add("_extra_state")
        names |= {f"{path}.{name}" if path else name for name in own}
    return names
