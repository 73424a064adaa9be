"""Two matches that one module can serve: q and k of one call, turned by the same cos and sin.

q2 = rotary(q, cos, sin); k2 = rotary(k, cos, sin)   ->   q2, k2 = rotary(q, k, cos, sin)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import fx

from liger_fx.engine.facts import Facts
from liger_fx.engine.match import Match
from liger_fx.engine.mounting import Plan
from liger_fx.engine.rule import Rule

Group = tuple[Match, ...]


def pair_up(
    rule: Rule, matches: Sequence[Match], plans: Mapping[fx.Node, Plan], facts: Facts
) -> list[tuple[Group, Plan]]:
    """All matches with their plans, those that go together joined, in the graph's order."""
    groups: list[tuple[Group, Plan]] = []
    alone: dict[str, list[int]] = defaultdict(list)
    for match in matches:
        plan = plans[match.root]
        for i in alone[plan.path]:
            joined = _join(rule, groups[i][0][0], match, plan, facts)
            if joined is not None:
                groups[i] = joined
                alone[plan.path].remove(i)
                break
        else:
            if plan.owner is None:
                alone[plan.path].append(len(groups))
            groups.append(((match,), plan))
    return groups


def _join(
    rule: Rule, first: Match, second: Match, plan: Plan, facts: Facts
) -> tuple[Group, Plan] | None:
    replacement = rule.pair(first, second)
    group = (first, second)
    if replacement is None or facts.call(first.root) is not facts.call(second.root):
        return None
    if insertion_point(group, facts) is None:
        return None
    return group, Plan(replacement, plan.path, None)


def insertion_point(group: Group, facts: Facts) -> fx.Node | None:
    """The node before which one node can stand for all roots; None where there is no such place.

    It is below the inputs of every match and above the readers of any, with no effect in between.
    """
    position = facts.position
    roots = [match.root for match in group]
    if len(group) == 1:
        return roots[0]
    readers = [user for root in roots for user in root.users]
    place = min([max(roots, key=position.__getitem__), *readers], key=position.__getitem__)
    covered = {node for match in group for node in (*match.covered, match.root)}
    inputs = {n for node in covered for n in node.all_input_nodes} - covered
    if any(position[node] >= position[place] for node in inputs):
        return None
    first = min(covered, key=position.__getitem__)
    last = max((place, *roots), key=position.__getitem__)
    return None if any(facts.effects_between(first, last)) else place
