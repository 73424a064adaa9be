"""How far each form of a pattern comes at a node, step by step, and where it parts from the graph.

weight * x * rsqrt(mean(square(x)) + eps)   at   mul_1
    ->  mul_1 is weight * x * rsqrt(...), mul is x * rsqrt(...), rsqrt is rsqrt(...),
        add is mean(...) + eps, then: wanted mean(square(x)), found sum_1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from liger_fx.engine import pattern as p
from liger_fx.engine.match import Miss
from liger_fx.engine.matcher import Attempt
from liger_fx.engine.term import Term
from liger_fx.engine.terms import Terms
from liger_fx.tracing.trace import Source


@dataclass(frozen=True)
class Value:
    """A value of the graph in words, and the line of the model's code that it was traced from."""

    text: str
    source: Source | None

    @classmethod
    def of(cls, term: Term) -> Value:
        """The words for a term, as the graph is now."""
        return cls(str(term), None if term.node is None else term.node.meta.get("source"))


@dataclass(frozen=True)
class Step:
    """A part of the pattern, and the value that it was held against."""

    wanted: str
    found: Value


@dataclass(frozen=True)
class Course:
    """How one form of a pattern fared. All is in words, since rewriting goes on.

    steps: what fitted, in the order in which it was tried. covered: how many nodes that were.
    wanted, found: where it parts, what would have fitted and what stands there; ``wanted`` is empty
        where the whole form fits. why: more than that, if there is more to say.
    """

    form: str
    steps: tuple[Step, ...]
    covered: int
    wanted: tuple[str, ...] = ()
    found: Value | None = None
    why: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the whole form fits."""
        return not self.wanted


def courses(pattern: p.Pattern, roots: Iterable[fx.Node], view: Terms) -> list[Course]:
    """For each form of the pattern, how it fares at that root at which it comes furthest.

    Those that come furthest first.
    """
    roots = list(roots)
    best = [
        max((_course(form, root, view) for root in roots), key=_distance) for form in forms(pattern)
    ]
    return sorted(best, key=_distance, reverse=True)


def forms(pattern: p.Pattern) -> Iterator[p.Pattern]:
    """The pattern's alternatives, one by one, where it is made of alternatives."""
    if isinstance(pattern, p.Either | p.Choice):
        for alternative in pattern.below():
            yield from forms(alternative)
    else:
        yield pattern


def _distance(course: Course) -> tuple[bool, int]:
    return course.fits, course.covered


def _course(form: p.Pattern, root: fx.Node, view: Terms) -> Course:
    recording = _Recording(view, root.meta.get("call"))
    for _ in recording.match(form, view(root)):
        return Course(str(form), _in_words(recording.trail), len(set(recording.covered)))
    assert recording.furthest is not None, "what does not fit parts somewhere"
    miss = recording.furthest
    return Course(
        str(form),
        _in_words(recording.steps),
        len(set(miss.covered)),
        tuple(dict.fromkeys(str(one) for wanted in recording.wanted for one in forms(wanted))),
        Value.of(miss.found),
        miss.why,
    )


_Trail = list[tuple[p.Pattern, Term]]


def _in_words(trail: _Trail) -> tuple[Step, ...]:
    """Without the alternatives: which of them it is shows in the step that follows."""
    return tuple(
        Step(str(wanted), Value.of(found))
        for wanted, found in trail
        if not isinstance(wanted, p.Either | p.Choice)
    )


class _Recording(Attempt):
    """An attempt that remembers its way.

    trail: what fits so far. steps: the trail when most of the graph was covered. wanted: everything
    that would have fitted there.
    """

    def __init__(self, view: Terms, home: int | None) -> None:
        super().__init__(view, home)
        self.trail: _Trail = []
        self.steps: _Trail = []
        self.wanted: list[p.Pattern] = []

    def match(self, pattern: p.Pattern, term: Term) -> Iterator[None]:
        """Every way to fit; a step stays on the trail as long as it does."""
        ways = super().match(pattern, term)
        self.trail.append((pattern, term))
        yield from ways
        self.trail.pop()

    def missed(self, wanted: p.Pattern, found: Term, why: str | None = None) -> None:
        """What did not fit is kept if nothing came further, beside what was tried there before."""
        before = self.furthest
        super().missed(wanted, found, why)
        miss = self.furthest
        if miss is not before:
            tried_last = bool(self.trail) and self.trail[-1][0] is wanted
            self.steps, self.wanted = self.trail[: -1 if tried_last else None], [wanted]
        elif miss is not None and self._is_at(miss, found):
            self.wanted.append(wanted)

    def _is_at(self, miss: Miss, found: Term) -> bool:
        """Whether this is the place where the attempt that came furthest ended, too."""
        return len(self.covered) == len(miss.covered) and found.node is miss.found.node
