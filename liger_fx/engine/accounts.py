"""What happened, in words: a Site for each match, each refused candidate, and each module that has
the name of one and holds none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from liger_fx.engine.facts import Facts
from liger_fx.engine.match import Match
from liger_fx.engine.mounting import Plan
from liger_fx.engine.rule import Reject, Rule
from liger_fx.engine.search import Refusal
from liger_fx.engine.site import Site
from liger_fx.engine.term import describe
from liger_fx.tracing.trace import Source
from liger_fx.tracing.walk import module_at


def rewritten(rule: Rule, group: Sequence[Match], plan: Plan, path: str, facts: Facts) -> Site:
    """The site of matches that became a call of the module at ``path``."""
    names = captured_names(group)
    nodes = {node for match in group for node in (*match.covered, match.root)}
    before = [describe(node, names) for node in sorted(nodes, key=facts.position.__getitem__)]
    held_by = plan.owner.module if plan.owner else facts.module(plan.path)
    return Site(
        rule=rule.name,
        path=plan.path,
        source=group[0].root.meta.get("source"),
        before_class=type(held_by).__name__,
        before=tuple(before),
        after=f"call_module {path}",
        after_class=type(plan.replacement.module).__name__,
        reason=None,
    )


def refused(rule: Rule, refusal: Refusal, facts: Facts) -> Site:
    """The site of a candidate that stays as it is."""
    node, why = refusal.node, refusal.why
    call = facts.call(node)
    is_leaf = node.op == "call_module" and set(refusal.covered) <= {node}
    path = str(node.target) if is_leaf else call.path
    text = f"{why.reason}{_at(why.node)}" if isinstance(why, Reject) else f"{why}{_line(why.node)}"
    covered = sorted({node, *refusal.covered}, key=facts.position.__getitem__)
    return Site(
        rule=rule.name,
        path=path,
        source=node.meta.get("source"),
        before_class=type(facts.module(path)).__name__ if is_leaf else call.cls.__name__,
        before=tuple(describe(n) for n in covered),
        after=None,
        after_class=None,
        reason=text,
    )


def unexplained(facts: Facts, rules: Sequence[Rule], sites: Iterable[Site]) -> list[Site]:
    """A refused site for each module with a candidate's class name that no site speaks of, and of
    which something is left."""
    opaque = {leaf.path: leaf for leaf in facts.trace.opaque}
    spoken: dict[str, set[str]] = {rule.name: set() for rule in rules}
    named = {rule.name: rule for rule in rules}
    for site in sites:
        own, name = named[site.rule], site.before_class
        for rule in (own, *(other for other in rules if own.knows(name) and other.knows(name))):
            spoken[rule.name].update(_with_ancestors(site.path))
    found: list[Site] = []
    called = _called(facts)
    for path in sorted(called, key=lambda path: path.count("."), reverse=True):
        name, source, is_leaf = called[path]
        kin = [rule.name for rule in rules if rule.knows(name)]
        if not kin or any(path in spoken[known] for known in kin):
            continue
        reason = f"no {' or '.join(kin)} was found in it"
        if is_leaf:
            reason = "opaque leaf, not traced through"
        if path in opaque:
            reason += f": {opaque[path].reason}"
        found.append(Site(kin[0], path, source, name, (), None, None, reason))
        spoken[kin[0]].update(_with_ancestors(path))
    order = list(called)
    return sorted(found, key=lambda site: order.index(site.path))


def _with_ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    yield from (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _called(facts: Facts) -> dict[str, tuple[str, Source | None, bool]]:
    """Every called module by path: class name, where it was called or begins, whether a leaf.

    The modules of torch.nn and of this package are what they say they are, and are left out; so are
    those whose operations were all replaced.
    """
    trace = facts.trace
    first: dict[int, Source | None] = {}
    leaves: dict[str, fx.Node] = {}
    for node in trace.graph.nodes:
        first.setdefault(node.meta.get("call") or 0, node.meta.get("source"))
        if node.op == "call_module":
            leaves.setdefault(str(node.target), node)
    called = {
        call.path: (call.cls.__name__, first.get(call.index), False)
        for call in trace.calls
        if call.path and not facts.is_replaced(call)
    }
    for path, node in leaves.items():
        cls = type(module_at(trace.root, path))
        if not cls.__module__.startswith(("torch.nn", "liger_fx.")):
            called[path] = (cls.__name__, node.meta.get("source"), True)
        else:
            called.pop(path, None)
    return called


def captured_names(group: Sequence[Match]) -> dict[fx.Node, str]:
    """What the pattern calls the captured nodes; ``x`` of a second match is ``x2``."""
    names: dict[fx.Node, str] = {}
    for i, match in enumerate(group):
        for node, name in match.names.items():
            names.setdefault(node, f"{name}{i + 1}" if i else name)
    return names


def _at(node: fx.Node | None) -> str:
    return "" if node is None else f" ({describe(node)}{_line(node)})"


def _line(node: fx.Node | None) -> str:
    source = node.meta.get("source") if node is not None else None
    return f" at {os.path.basename(source[0])}:{source[1]}" if source else ""
