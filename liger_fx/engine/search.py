"""Looks for one rule's sites: where its pattern fits and may be replaced, or why it may not.

Places that look like one (rule.looks_like) are where it starts; from each it goes up through the
operators that the pattern has above that, and tries the pattern from the outermost node inwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from liger_fx.engine.facts import Facts
from liger_fx.engine.matcher import Match, Miss, find
from liger_fx.engine.pattern import Chain, Op, Pattern
from liger_fx.engine.rule import Reject, Rule
from liger_fx.engine.term import is_transparent
from liger_fx.engine.terms import Terms


@dataclass(frozen=True)
class Refusal:
    """A candidate that stays as it is: where it starts, the nodes that fitted, and why not more."""

    node: fx.Node
    covered: tuple[fx.Node, ...]
    why: Miss | Reject


@dataclass(frozen=True)
class Climb:
    """How to get from what looks like a site to its root: through which operators, how many."""

    ops: frozenset[str]
    steps: int

    @classmethod
    def of(cls, pattern: Pattern, starts: frozenset[str]) -> Climb:
        """Read off the pattern: what stands above the operators in ``starts``."""
        ops, steps = _above(pattern, starts)
        return cls(frozenset(ops), max(steps, 0))

    def roots(self, start: fx.Node, facts: Facts, view: Terms) -> list[fx.Node]:
        """The start and what is computed from it in that way, outermost first."""
        seen = {start: 0}
        pending = [start]
        while pending:
            node = pending.pop()
            for user in node.users:
                term = view(user)
                free = is_transparent(term)
                if user in seen or not (free or (term.op in self.ops and seen[node] < self.steps)):
                    continue
                if free and user.meta.get("call") != node.meta.get("call"):
                    continue  # the cast is another module's: it is not part of this value
                seen[user] = seen[node] + (not free)
                pending.append(user)
        return sorted(seen, key=facts.position.__getitem__, reverse=True)


def _above(pattern: Pattern, starts: frozenset[str]) -> tuple[set[str], int]:
    """The operators above ``starts`` in the pattern, and the longest way; -1 for no start."""
    ops: set[str] = set()
    steps = 0 if isinstance(pattern, Op | Chain) and pattern.op in starts else -1
    for part in pattern.below():
        inner_ops, inner_steps = _above(part, starts)
        if inner_steps < 0:
            continue
        ops |= inner_ops
        own = 0
        if isinstance(pattern, Chain):
            own = len(pattern.parts) - 1
        elif isinstance(pattern, Op):
            own = 1
        if own:
            ops.add(pattern.op)  # type: ignore[attr-defined]
        steps = max(steps, inner_steps + own)
    return ops, steps


def search(
    rule: Rule, facts: Facts, view: Terms, allow: Callable[[Match], Any]
) -> tuple[list[Match], list[Refusal]]:
    """The rule's matches and refused candidates, in the graph's order; ``allow`` raises Reject."""
    starts = rule.looks_like.heads
    assert starts is not None, "what a site looks like begins with an operator"
    climb = Climb.of(rule.pattern, starts)
    matches: list[Match] = []
    refusals: dict[fx.Node, Refusal] = {}
    taken: set[fx.Node] = set()
    for start in list(view.named(facts.position, starts)):
        if start in taken or isinstance(find(rule.looks_like, start, view), Miss):
            continue
        roots = climb.roots(start, facts, view)
        result = _outermost(rule, start, roots, view, allow)
        if isinstance(result, Match):
            matches.append(result)
            taken.update(result.covered, (result.root,))
        else:
            _keep_nearest(refusals, result, roots)
    unique = {id(r): r for r in refusals.values() if r.node not in taken}
    return matches, list(unique.values())


def _outermost(
    rule: Rule, start: fx.Node, roots: list[fx.Node], view: Terms, allow: Callable[[Match], Any]
) -> Match | Refusal:
    """The match at the outermost root that has one; else the best account of why there is none."""
    miss: Miss | None = None
    reject: tuple[Match, Reject] | None = None
    for root in roots:
        found = find(rule.pattern, root, view)
        if isinstance(found, Miss):
            if miss is None or len(found.covered) > len(miss.covered):
                miss = found
            continue
        if start is not root and start not in found.covered:
            continue
        try:
            allow(found)
            return found
        except Reject as reason:
            reject = reject or (found, reason)
    if reject is not None:
        return Refusal(start, reject[0].covered, reject[1])
    assert miss is not None
    return Refusal(start, miss.covered or (start,), miss)


def _keep_nearest(refusals: dict[fx.Node, Refusal], new: Refusal, roots: list[fx.Node]) -> None:
    """Two starts that lead to one root are one candidate: the account that got further stays."""
    old = next((refusals[root] for root in roots if root in refusals), None)
    if old is not None and (isinstance(old.why, Reject), len(old.covered)) >= (
        isinstance(new.why, Reject),
        len(new.covered),
    ):
        new = old
    for root in roots:
        refusals[root] = new
