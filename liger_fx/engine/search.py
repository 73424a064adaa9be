"""Looks for one rule's sites: where its pattern fits and may be replaced, or why it may not.

Places that look like one (rule.looks_like) are where it starts; from each it goes up through the
operators that the pattern has above that, and tries the pattern from the outermost node inwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from liger_fx.engine.climb import Climb
from liger_fx.engine.facts import Facts
from liger_fx.engine.match import Match, Miss
from liger_fx.engine.matcher import find
from liger_fx.engine.pattern import Pattern
from liger_fx.engine.rule import Reject, Rule
from liger_fx.engine.terms import Terms


@dataclass(frozen=True)
class Refusal:
    """A candidate that stays as it is: where it starts, the nodes that fitted, and why not more."""

    node: fx.Node
    covered: tuple[fx.Node, ...]
    why: Miss | Reject


def search(
    rule: Rule, facts: Facts, view: Terms, allow: Callable[[Match], Any]
) -> tuple[list[Match], list[Refusal]]:
    """The rule's matches and refused candidates, in the graph's order; ``allow`` raises Reject."""
    starts = rule.looks_like.heads
    assert starts is not None, "what a site looks like begins with an operator"
    climb = Climb.of(rule.pattern, rule.looks_like)
    matches: list[Match] = []
    refusals: dict[fx.Node, Refusal] = {}
    taken: set[fx.Node] = set()
    for start in list(view.named(facts.position, starts)):
        if start in taken or not _fits(rule.looks_like, start, view):
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
        for found in find(rule.pattern, root, view):
            if isinstance(found, Miss):
                if miss is None or len(found.covered) > len(miss.covered):
                    miss = found
            elif start is root or start in found.covered:
                try:
                    allow(found)
                    return found
                except Reject as reason:
                    reject = reject or (found, reason)
    if reject is not None:
        return Refusal(start, reject[0].covered, reject[1])
    assert miss is not None
    return Refusal(start, miss.covered or (start,), miss)


def _fits(pattern: Pattern, root: fx.Node, view: Terms) -> bool:
    return isinstance(next(find(pattern, root, view), None), Match)


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
