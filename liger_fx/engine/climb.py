"""The way from what looks like a site up to the node that the site's pattern computes.

    looks_like = rsqrt(anything)   in   weight * x * rsqrt(...)   ->   two products further up

It is read off the pattern: where what it looks like stands in it, and which operators are above.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import fx

from liger_fx.engine.facts import Facts
from liger_fx.engine.pattern import (
    Anything,
    Chain,
    Choice,
    Either,
    Inner,
    Op,
    Pattern,
    Tensor,
)
from liger_fx.engine.term import is_transparent
from liger_fx.engine.terms import Terms


@dataclass(frozen=True)
class Climb:
    """The operators that stand above, and the most of them on one way."""

    ops: frozenset[str]
    steps: int

    @classmethod
    def of(cls, pattern: Pattern, looks_like: Pattern) -> Climb:
        """The climb from where ``looks_like`` stands in ``pattern``."""
        return _above(pattern, looks_like) or cls(frozenset(), 0)

    def roots(self, start: fx.Node, facts: Facts, view: Terms) -> list[fx.Node]:
        """The start and what is computed from it in that way, outermost first."""
        seen = {start: 0}
        pending = [start]
        while pending:
            node = pending.pop()
            for user in node.users:
                term = view(user)
                free = is_transparent(term) or node in term.hidden
                if user in seen or not (free or (term.op in self.ops and seen[node] < self.steps)):
                    continue
                if is_transparent(term) and user.meta.get("call") != node.meta.get("call"):
                    continue  # the cast is another module's: it is not part of this value
                seen[user] = seen[node] + (not free)
                pending.append(user)
        return sorted(seen, key=facts.position.__getitem__, reverse=True)


@cache  # a part that stands in many places of a pattern is looked at once
def _above(pattern: Pattern, looks_like: Pattern) -> Climb | None:
    """What stands above ``looks_like`` in the pattern; None where it does not stand in it."""
    ops, steps = set[str](), 0 if _shows(pattern, looks_like) else None
    own = {Chain: len(pattern.below()) - 1, Op: 1}.get(type(pattern), 0)
    for part in pattern.below():
        inner = _above(part, looks_like)
        if inner is None:
            continue
        ops |= inner.ops | (pattern.heads if own and pattern.heads else frozenset())
        steps = max(steps or 0, inner.steps + own)
    return None if steps is None else Climb(frozenset(ops), steps)


@cache
def _shows(pattern: Pattern, looks_like: Pattern) -> bool:
    """Whether the two can be the same place of a graph, told by operators that both name."""
    if isinstance(looks_like, Tensor | Anything):
        return True
    if isinstance(looks_like, Either | Choice):
        return any(_shows(pattern, one) for one in looks_like.below())
    if isinstance(pattern, Either | Choice | Inner):
        return any(_shows(one, looks_like) for one in pattern.below())
    if type(pattern) is not type(looks_like) or pattern.heads != looks_like.heads:
        return False
    return all(
        any(_shows(theirs, ours) for theirs in pattern.below()) for ours in looks_like.below()
    )
