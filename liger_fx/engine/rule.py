"""What a rule is, and how rules are found: every file of passes/ that defines one is a rule.

class RMSNorm(Rule):
    name = "rms_norm"
    pattern = weight * x * rsqrt(mean(square(x)) + eps)      what it computes
    looks_like = rsqrt(anything)                             what makes a place worth a word

    def check(self, match): ...     raises Reject(reason, node), or returns what it found out
    def build(self, match, owner):  the named module, and what goes into it
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import fx, nn

from liger_fx.engine.match import Match
from liger_fx.engine.pattern import Pattern
from liger_fx.engine.term import Term
from liger_fx.tracing.walk import modules_by_path


class Reject(Exception):
    """The one way in which a site is refused: why, and the node that the reason is about."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Owner:
    """A module of the model of which a match covers every operation."""

    path: str
    module: nn.Module

    def own_name(self, path: Any) -> str:
        """The name under which the owner itself holds the parameter or child at ``path``.

        Raises Reject when it belongs to another module, or to a module inside this one.
        """
        prefix = f"{self.path}."
        name = str(path).removeprefix(prefix)
        if not str(path).startswith(prefix) or "." in name:
            raise Reject(f"{path} is not the module's own")
        return name


@dataclass(frozen=True)
class Replacement:
    """The named module, the values it is called with, and its name as a new child.

    The module's state_dict has the keys of the owner's where it takes the owner's place, and is
    empty where it is mounted beside: parameters of other modules are inputs then.
    results: inner values that the module gives as well, after the value of the root.
    called_with: what the owner was called with, where that is not `inputs` but an inner value. The
    module still takes that, too: where no graph serves a call, the model's own code calls it.
    """

    module: nn.Module
    inputs: tuple[Term, ...]
    name: str
    results: tuple[Term, ...] = ()
    called_with: tuple[Term, ...] | None = None


class Rule(ABC):
    """One rewrite. It keeps no state: what ``check`` returns is ``match.found`` to the builders.

    name: what reports and filters call it; also the name of a module that it mounts.
    pattern: the formula it replaces. looks_like: the formula that makes a place a candidate, which
    is reported when it is not replaced; a part of ``pattern`` or its relative.
    class_names: a regular expression; a module whose class name it finds is a candidate, too.
    takes_linear: its module computes what linear layers computed; else it calls or leaves them.
    """

    name: ClassVar[str]
    pattern: ClassVar[Pattern]
    looks_like: ClassVar[Pattern]
    class_names: ClassVar[str | None] = None
    takes_linear: ClassVar[bool] = False

    def knows(self, class_name: str) -> bool:
        """Whether a module of that class is a candidate by its name."""
        return bool(self.class_names and re.search(self.class_names, class_name))

    @abstractmethod
    def check(self, match: Match) -> Any:
        """Look at dtypes, shapes and constants: Reject, or what the builders need to know."""

    @abstractmethod
    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        """The module in the owner's place, or a module without parameters when there is no owner.

        None: there is no such module. Reject: not in this place.
        """

    def pair(self, first: Match, second: Match) -> Replacement | None:
        """One module for two matches of one module call, giving both results; None: apart."""
        return None


def discover(package: str = "liger_fx.passes") -> list[Rule]:
    """One instance of every rule that the package's files define, by file name."""
    rules: list[Rule] = []
    names = sorted(
        info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)
    )
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Rule)
                and value.__module__ == module.__name__
            ):
                rules.append(value())
    return rules


@dataclass(frozen=True)
class Selection:
    """Which sites to rewrite, by rule name, or by module path: a path with all below it, or a glob;
    ``rule@path`` is that rule there.

    chosen: nothing but these, None for everything. excluded: not these. prefix: where the paths
    that are asked about begin.
    """

    chosen: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    prefix: str = ""

    def below(self, path: str) -> Selection:
        """The same for paths below the module at ``path``."""
        return replace(self, prefix=path)

    def refusal(self, rule: str, path: str) -> str | None:
        """Why a site is left out; None if it is not."""
        path = ".".join(part for part in (self.prefix, path) if part)
        for entry in self.excluded:
            if _selects(entry, rule, path):
                return f"excluded by {entry!r}"
        if self.chosen is None or any(_selects(entry, rule, path) for entry in self.chosen):
            return None
        return "not among the rules and paths that were chosen"

    def unknown(self, rules: Iterable[Rule], root: nn.Module) -> list[str]:
        """The entries that name no rule and no module: most likely misspelled."""
        entries = (*(self.chosen or ()), *self.excluded)
        if not entries:
            return []
        names = [rule.name for rule in rules]
        paths = modules_by_path(root, every_place=True)
        return [
            entry
            for entry in entries
            if not any(_selects(entry, name, path) for name in names for path in paths)
        ]


def _selects(entry: str, rule: str, path: str) -> bool:
    only, at, place = entry.partition("@")
    if at:
        return fnmatchcase(rule, only) and _selects(place, "", path)
    return fnmatchcase(rule, entry) or fnmatchcase(path, entry) or fnmatchcase(path, f"{entry}.*")
