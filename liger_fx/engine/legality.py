"""What every match must obey, whatever the rule: nothing else may notice that its nodes go."""

from __future__ import annotations

from liger_fx.engine.facts import Facts, computes
from liger_fx.engine.match import Match
from liger_fx.engine.rule import Reject
from liger_fx.engine.term import describe
from liger_fx.tracing.effects import is_region_boundary


def check_readers(match: Match) -> None:
    """Inner results that cost something are read by nothing outside the match.

    Views, casts and parameters may be: they stay for their other reader.
    """
    inside = {*match.covered, match.root}
    for node in match.covered:
        if node is match.root or not computes(node):
            continue
        for user in node.users:
            if user not in inside:
                raise Reject(f"an inner result is also read by {describe(user)}", node)


def check_effects(match: Match, facts: Facts) -> None:
    """No in-place operation and no change of grad or autocast mode lies between its nodes."""
    first = min(match.covered, key=facts.position.__getitem__, default=match.root)
    effect = facts.effect_between(first, match.root)
    if effect is None:
        return
    if is_region_boundary(effect):
        raise Reject("the grad or autocast mode changes in the middle of it", effect)
    raise Reject(f"{describe(effect)} works in place in the middle of it", effect)
