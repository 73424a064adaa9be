"""Finds a pattern at a node of the graph, or says how far it came.

    weight * x * rsqrt(mean(square(x)) + eps)   at   mul_1 = weight * to_1
        ->  Match(x=..., weight=..., eps=1e-06, covered=[pow_1, mean, add, rsqrt, mul, to_1, mul_1])
        or  Miss(wanted mean(...), found sum_1)

Every alternative, order and bracketing is tried; of those that do not fit, the one that covered
most of the graph is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx

from liger_fx.engine import pattern as p
from liger_fx.engine.match import Match, Miss
from liger_fx.engine.slices import whole
from liger_fx.engine.term import FLOATS, Term, bare, is_transparent, loses_nothing
from liger_fx.engine.terms import Terms


def find(pattern: p.Pattern, root: fx.Node, view: Terms) -> Iterator[Match | Miss]:
    """Every way in which ``pattern`` computes the value of ``root``; the furthest miss if none."""
    attempt, fits = Attempt(view, root.meta.get("call")), False
    for _ in attempt.match(pattern, view(root)):
        fits = True
        bound, inner = dict(attempt.bound), dict(attempt.inner)
        anywhere = attempt.anywhere & inner.keys()
        yield Match(root, bound, tuple(attempt.covered), view, inner, anywhere)
    if not fits and attempt.furthest is not None:
        yield attempt.furthest


class Attempt:
    """One search. Each ``_match_*`` yields once for every way to fit, and undoes it after."""

    def __init__(self, view: Terms, home: int | None) -> None:
        self.view, self.home = view, home
        self.bound: dict[str, Any] = {}
        self.inner: dict[str, Term] = {}
        self.anywhere: set[str] = set()
        self.covered: list[fx.Node] = []
        self.furthest: Miss | None = None

    def match(self, pattern: p.Pattern, term: Term) -> Iterable[None]:
        """Every way in which the term fits; names are bound and nodes covered while it does."""
        if pattern.heads is not None:
            bare = term
            while is_transparent(bare):
                bare = bare.operands[0]
            if bare.op not in pattern.heads:
                self.missed(pattern, bare, _why_no_part(pattern, bare))
                return ()
        return _MATCHERS[type(pattern)](self, pattern, term)

    def missed(self, wanted: p.Pattern, found: Term, why: str | None = None) -> None:
        """Remember what did not fit if nothing came further."""
        if self.furthest is None or len(self.covered) > len(self.furthest.covered):
            self.furthest = Miss(tuple(self.covered), wanted, found, why)

    def _look_through(self, term: Term) -> Term:
        while is_transparent(term):
            self.covered += term.nodes
            term = term.operands[0]
        return term

    def _each(self, pairs: list[tuple[p.Pattern, Term]]) -> Iterator[None]:
        if not pairs:
            yield
            return
        for _ in self.match(*pairs[0]):
            yield from self._each(pairs[1:])

    def _match_op(self, pattern: p.Op, term: Term) -> Iterator[None]:
        mark = len(self.covered)
        term = self._look_through(term)
        if term.arity != len(pattern.operands):
            self.missed(pattern, term)
        else:
            self.covered += term.nodes
            names = self._bind_attributes(pattern, term)
            if names is not None:
                yield from self._each(
                    [(pattern.operands[i], term.operands[i]) for i in pattern.order]
                )
                for name in names:
                    del self.bound[name]
        del self.covered[mark:]

    def _bind_attributes(self, pattern: p.Op, term: Term) -> list[str] | None:
        """The names newly bound; None if an attribute is not as wanted."""
        new: list[str] = []
        for key, wanted in pattern.attributes.items():
            value = term.attributes.get(key)
            if isinstance(wanted, p.Constant):
                if wanted.name not in self.bound:
                    self.bound[wanted.name] = value
                    new.append(wanted.name)
                    continue
                wanted = self.bound[wanted.name]
            if value != wanted:
                self.missed(pattern, term, f"{key} is {value}, not {wanted}, in {term}")
                for name in new:
                    del self.bound[name]
                return None
        return new

    def _match_chain(self, pattern: p.Chain, term: Term) -> Iterator[None]:
        mark = len(self.covered)
        term = self._look_through(term)
        self.covered += term.nodes
        for first, place, second in pattern.splits:
            for _ in self.match(first, term.operands[place]):
                yield from self.match(second, term.operands[1 - place])
        del self.covered[mark:]

    def _match_part(self, pattern: p.Part, term: Term) -> Iterator[None]:
        mark = len(self.covered)
        term = self._look_through(term)
        tensor = whole(self.view, term, pattern.which)
        if tensor is None:
            self.missed(pattern, term)
        else:
            self.covered += term.nodes
            yield from self.match(pattern.tensor, tensor)
        del self.covered[mark:]

    def _match_inner(self, pattern: p.Inner, term: Term) -> Iterator[None]:
        before, node = self.inner.get(pattern.name), bare(term).node
        around = within = self.home
        if pattern.apart and node is not None:
            within = node.meta.get("call")
        if pattern.anywhere:
            self.anywhere.add(pattern.name)
        self.home = within
        for _ in self.match(pattern.value, term):
            self.inner[pattern.name], self.home = term, around
            yield
            del self.inner[pattern.name]
            self.home = within
            if before is not None:  # the name stands twice
                self.inner[pattern.name] = before
        self.home = around

    def _match_either(self, pattern: p.Either, term: Term) -> Iterator[None]:
        for alternative in pattern.alternatives:
            yield from self.match(alternative, term)

    def _match_choice(self, pattern: p.Choice, term: Term) -> Iterator[None]:
        known = pattern.name in self.bound
        for label, alternative in pattern.alternatives.items():
            if known and self.bound[pattern.name] != label:
                continue
            for _ in self.match(alternative, term):
                self.bound[pattern.name] = label
                yield
                if not known:
                    del self.bound[pattern.name]

    def _match_tensor(self, pattern: p.Tensor, term: Term) -> Iterator[None]:
        name, known = pattern.name, self.bound.get(pattern.name)
        mark, fits = len(self.covered), False
        for value, passed in self._meanings(term):
            if not _fits(pattern, value) or not (known is None or self.view.same(known, value)):
                continue
            fits = True
            self.covered += passed
            self.bound[name] = value if known is None or known.node is None else known
            yield
            self.bound[name] = known
            del self.covered[mark:]
        if known is None:
            self.bound.pop(name, None)
        if not fits:
            why = _why_no_tensor(pattern, term)
            if known is not None:
                why = f"wanted {name} ({known}) again, found {term}"
            self.missed(pattern, term, why)

    def _meanings(self, term: Term) -> list[tuple[Term, tuple[fx.Node, ...]]]:
        """What a tensor can be taken for: what a harmless cast was made from, else its result."""
        passed = tuple[fx.Node, ...]()
        meanings = [(term, passed)]
        while self._is_own_cast(term):
            passed, term = (*passed, *term.nodes), term.operands[0]
            meanings.append((term, passed))
        return meanings[::-1]

    def _is_own_cast(self, term: Term) -> bool:
        """An alias or harmless cast made by the same module call: what came in stays as it came."""
        if term.op != "alias" and not (term.op == "cast" and loses_nothing(term)):
            return False
        return term.node is not None and term.node.meta.get("call") == self.home

    def _match_constant(self, pattern: p.Constant, term: Term) -> Iterator[None]:
        if term.op != "constant" or type(term.number) not in (int, float):
            self.missed(pattern, term)
        elif pattern.name not in self.bound:
            self.bound[pattern.name] = term.number
            yield
            del self.bound[pattern.name]
        elif self.bound[pattern.name] == term.number:
            yield
        else:
            self.missed(pattern, term, f"{pattern.name} is {term}, not {self.bound[pattern.name]}")

    def _match_number(self, pattern: p.Number, term: Term) -> Iterator[None]:
        value = term.number if term.op == "constant" else None
        if isinstance(value, int | float) and math.isclose(value, pattern.value, rel_tol=1e-6):
            yield
        else:
            self.missed(pattern, term)

    def _match_anything(self, pattern: p.Anything, term: Term) -> Iterator[None]:
        yield


def _fits(pattern: p.Tensor, value: Term) -> bool:
    """Whether it is a tensor of the kind that the pattern speaks of."""
    if value.spec is None or pattern.rank not in (None, len(value.spec.shape)):
        return False
    dtype = value.spec.dtype
    return dtype in FLOATS or (pattern.integers and not dtype.is_complex)


def _why_no_tensor(pattern: p.Tensor, term: Term) -> str | None:
    if term.spec is None:
        return None
    if pattern.rank not in (None, len(term.spec.shape)):
        return f"wanted {pattern}, found {term} of {term.spec}: not of {pattern.rank} dimensions"
    return f"wanted {pattern}, found {term} of {term.spec}: no tensor of floats"


def _why_no_part(pattern: p.Pattern, term: Term) -> str | None:
    """Which part of a tensor something is cannot be told where the sizes are not known."""
    if isinstance(pattern, p.Part) and term.spec is not None and term.width is None:
        return f"wanted {pattern}, found {term}, whose width is not fixed"
    return None


_MATCHERS: dict[type, Callable[[Attempt, Any, Term], Iterable[None]]] = {
    p.Op: Attempt._match_op,
    p.Chain: Attempt._match_chain,
    p.Part: Attempt._match_part,
    p.Inner: Attempt._match_inner,
    p.Either: Attempt._match_either,
    p.Choice: Attempt._match_choice,
    p.Tensor: Attempt._match_tensor,
    p.Constant: Attempt._match_constant,
    p.Number: Attempt._match_number,
    p.Anything: Attempt._match_anything,
}
