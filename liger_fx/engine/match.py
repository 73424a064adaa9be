"""What a search gives: the match of a pattern at a node, or how far it came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from liger_fx.engine.pattern import Pattern
from liger_fx.engine.term import Term, bare, is_transparent
from liger_fx.engine.terms import Terms
from liger_fx.tracing.trace import TensorSpec


@dataclass(frozen=True)
class Miss:
    """The furthest that a pattern came: what it wanted next, and what stood there."""

    covered: tuple[fx.Node, ...]
    wanted: Pattern
    found: Term
    why: str | None = None

    @property
    def node(self) -> fx.Node | None:
        """The node that stood there, if it was one."""
        return self.found.node

    def __str__(self) -> str:
        return self.why or f"wanted {self.wanted}, found {self.found}"


class Match:
    """A place where the whole pattern fits.

    root: the node whose value the pattern computes. covered: the nodes that compute it from the
    captured values, in the order in which they were matched; passed: those that are captured as
    well, under another name (an alias of the gate that is up itself). inner: the values on the way
    that the pattern names `Inner`; outside: the nodes of those that are so `anywhere`. found: what
    the rule's check returned.
    """

    def __init__(
        self,
        root: fx.Node,
        bound: dict[str, Any],
        covered: tuple[fx.Node, ...],
        view: Terms,
        inner: dict[str, Term] | None = None,
        anywhere: Iterable[str] = (),
    ) -> None:
        self.root, self.view, self.inner = root, view, inner or {}
        self.outside = {self.bare(name).node for name in anywhere}
        self.found: Any = None
        self._bound = bound
        inputs = {t.node for t in bound.values() if isinstance(t, Term)}
        self.covered = tuple(n for n in dict.fromkeys(covered) if n not in inputs)
        self.passed = tuple(n for n in dict.fromkeys(covered) if n in inputs)

    def __contains__(self, name: str) -> bool:
        return name in self._bound

    def __getitem__(self, name: str) -> Any:
        """A captured constant or the label of a choice; a Term for a tensor."""
        return self._bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The same, or ``default`` where the alternative that fits has no such name."""
        return self._bound.get(name, default)

    def spec(self, name: str) -> TensorSpec:
        """Shape, dtype and device of a captured tensor."""
        spec: TensorSpec = self._bound[name].spec
        return spec

    def handed_out(self, name: str) -> Term | None:
        """The inner value as something outside reads it, before a cast or after; None if nothing
        does."""
        term, inside = self.inner[name], {*self.covered, self.root}
        while term.node is None or inside.issuperset(term.node.users):
            if not is_transparent(term):
                return None
            term = term.operands[0]
        return term

    def bare(self, name: str) -> Term:
        """The inner value before any cast."""
        return bare(self.inner[name])

    @property
    def constants(self) -> dict[str, Any]:
        """Everything captured that is no tensor."""
        return {n: value for n, value in self._bound.items() if not isinstance(value, Term)}

    @property
    def root_spec(self) -> TensorSpec:
        """Shape, dtype and device of what the pattern computes."""
        spec: TensorSpec = self.root.meta["spec"]
        return spec

    @property
    def names(self) -> dict[fx.Node, str]:
        """The pattern's name of each captured node, for texts."""
        nodes = {n: t.node for n, t in self._bound.items() if isinstance(t, Term)}
        return {node: name for name, node in nodes.items() if node is not None}
