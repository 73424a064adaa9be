"""The language of rules: a pattern is the formula it finds.

    x, weight, eps = Tensor("x"), Tensor("weight"), Constant("eps")
    weight * x * rsqrt(mean(square(x)) + eps)

finds that product in any order and with any brackets, whatever eps is, with casts between floating
types anywhere below the root: operators are canonical (terms.py), products and sums
commute and associate, a name that stands twice must be the same value twice, and constants are
captured, so that a rule's check can look at them. ``either(...)`` lists alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


class Pattern:
    """A formula with names in it. Build one with the functions of operators.py and + - * **."""

    def __mul__(self, other: Pattern | float) -> Pattern:
        return Chain.of("mul", self, other)

    def __rmul__(self, other: float) -> Pattern:
        return Chain.of("mul", other, self)

    def __add__(self, other: Pattern | float) -> Pattern:
        return Chain.of("add", self, other)

    def __radd__(self, other: float) -> Pattern:
        return Chain.of("add", other, self)

    def __sub__(self, other: Pattern) -> Pattern:
        return Either((Op("sub", (self, other)), Chain.of("add", self, -other)))

    def __neg__(self) -> Pattern:
        return Op("neg", (self,))

    def __pow__(self, exponent: float) -> Pattern:
        return Op("pow", (self, Number(exponent)))

    def below(self) -> tuple[Pattern, ...]:
        """The patterns this one is made of."""
        return ()

    @cached_property
    def heads(self) -> frozenset[str] | None:
        """The operators that a term it fits can have; None for any."""
        heads = [part.heads for part in self.below()]
        return None if None in heads else frozenset().union(*(h for h in heads if h))

    @cached_property
    def vagueness(self) -> int:
        """Telling patterns are matched first, so that a name is bound where it means one thing."""
        return 0


@dataclass(frozen=True, eq=False)
class Tensor(Pattern):
    """A tensor of floats, under a name; casts that lose nothing are looked through where they can
    be. integers: whether one of whole numbers (indices, a count) fits as well. rank: how many
    dimensions it has, where that tells it from other tensors.
    """

    name: str
    integers: bool = False
    rank: int | None = None
    heads = None
    vagueness = 2

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Constant(Pattern):
    """A Python number, or an attribute of an operator, under a name."""

    name: str
    heads = frozenset({"constant"})

    def __str__(self) -> str:
        return f"the number {self.name}"


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    """One number, up to the digits that people write constants with."""

    value: float
    heads = frozenset({"constant"})

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True, eq=False)
class Anything(Pattern):
    """Any value, without a name."""

    heads = None
    vagueness = 2

    def __str__(self) -> str:
        return "anything"


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    """A canonical operator; an attribute is the value it must have, or a Constant to capture."""

    op: str
    operands: tuple[Pattern, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def below(self) -> tuple[Pattern, ...]:
        return self.operands

    @cached_property
    def heads(self) -> frozenset[str]:
        return frozenset({self.op})

    @cached_property
    def order(self) -> list[int]:
        """The places of the operands, telling ones first."""
        return sorted(range(len(self.operands)), key=lambda i: self.operands[i].vagueness)

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.operands))})"


@dataclass(frozen=True, eq=False)
class Chain(Pattern):
    """A sum or product of two or more, in any order and with any brackets."""

    op: str
    parts: tuple[Pattern, ...]

    @staticmethod
    def of(op: str, *parts: Pattern | float) -> Chain:
        """The chain of these parts; parts that are chains of the same operator are taken apart."""
        patterns = (p if isinstance(p, Pattern) else Number(p) for p in parts)
        flat = (
            q for p in patterns for q in (p.parts if isinstance(p, Chain) and p.op == op else (p,))
        )
        return Chain(op, tuple(flat))

    def below(self) -> tuple[Pattern, ...]:
        return self.parts

    @cached_property
    def heads(self) -> frozenset[str]:
        return frozenset({self.op})

    @cached_property
    def vagueness(self) -> int:
        return min(part.vagueness for part in self.parts)

    @cached_property
    def splits(self) -> list[tuple[Pattern, int, Pattern]]:
        """Every way to deal the parts to two operands: (first to match, its place, the other)."""
        ways = []
        for mask in range(1, 2 ** len(self.parts) - 1):
            left, right = (
                [q for i, q in enumerate(self.parts) if (mask >> i & 1) == s] for s in (1, 0)
            )
            sides = [self._part(left), self._part(right)]
            place = 0 if sides[0].vagueness <= sides[1].vagueness else 1
            ways.append((sides[place], place, sides[1 - place]))
        return ways

    def _part(self, parts: list[Pattern]) -> Pattern:
        return parts[0] if len(parts) == 1 else Chain(self.op, tuple(parts))

    def __str__(self) -> str:
        if self.op == "add":
            return " + ".join(map(str, self.parts))
        return " * ".join(f"({part})" if _is_sum(part) else str(part) for part in self.parts)


def _is_sum(pattern: Pattern) -> bool:
    while isinstance(pattern, Either):
        pattern = pattern.alternatives[0]
    return isinstance(pattern, Chain) and pattern.op == "add"


@dataclass(frozen=True, eq=False)
class Part(Pattern):
    """One half of a tensor along its last dimension; it finds the tensor from the half."""

    which: str
    tensor: Pattern
    heads = frozenset({"slice", "unsqueeze"})
    vagueness = 1

    def below(self) -> tuple[Pattern, ...]:
        return (self.tensor,)

    def __str__(self) -> str:
        return f"{self.which}({self.tensor})"


@dataclass(frozen=True, eq=False)
class Inner(Pattern):
    """A value inside the formula, under a name, that the model's output may hold as well: it is
    then a further result of the named module.

    anywhere: whether everything behind the formula may read it, and it may be computed outside the
    module whose place the named module takes, which is called with it.
    apart: whether a module of its own may compute it. Casts that such a module makes of what it is
    given are looked through like those of the module that computes the whole.
    """

    name: str
    value: Pattern
    anywhere: bool = False
    apart: bool = False

    def below(self) -> tuple[Pattern, ...]:
        return (self.value,)

    @cached_property
    def vagueness(self) -> int:
        return self.value.vagueness

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """Any of the alternatives, the first ones first."""

    alternatives: tuple[Pattern, ...]

    def below(self) -> tuple[Pattern, ...]:
        return self.alternatives

    @cached_property
    def vagueness(self) -> int:
        return max(pattern.vagueness for pattern in self.alternatives)

    def __str__(self) -> str:
        return str(self.alternatives[0])


@dataclass(frozen=True, eq=False)
class Choice(Pattern):
    """Any of the alternatives, the first ones first; the label is captured under a name."""

    name: str
    alternatives: dict[Any, Pattern]

    def below(self) -> tuple[Pattern, ...]:
        return tuple(self.alternatives.values())

    def __str__(self) -> str:
        return f"any {self.name}"


anything = Anything()


def either(*alternatives: Pattern) -> Pattern:
    """Any of the alternatives, the first ones first."""
    return Either(alternatives)


def choice(name: str, alternatives: dict[Any, Pattern]) -> Pattern:
    """Any of the alternatives, the first ones first; ``match[name]`` is the label of the one."""
    return Choice(name, alternatives)
