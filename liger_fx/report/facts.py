"""The facts of a rewrite, apart from every way of showing them.

    before: LlamaForCausalLM, 96 operators, its module tree    ->  Facts: sites, counts, trees
    after:  the same model, rewritten

Everything here is plain data (strings, numbers, tuples), so that a face needs no model to be drawn
and a diff can be kept when the models are gone. graph_diff.py gives the facts their faces.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Self

from liger_fx import __version__
from liger_fx.engine.site import Site
from liger_fx.report.blocks import BlockRow, FallbackRow
from liger_fx.report.changes import SiteChange
from liger_fx.report.verified import Verified


@dataclass(frozen=True)
class TreeRow:
    """One module of a tree: its path ("" is the root), its type's name and its extra_repr()."""

    path: str
    class_name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.class_name}({self.detail})" if self.detail else self.class_name


@dataclass(frozen=True)
class Side:
    """One of the two things compared: operator counts by name, and the module tree."""

    class_name: str
    operators: dict[str, int]
    tree: tuple[TreeRow, ...]


@dataclass(frozen=True)
class Facts:
    """Two graphs of one model and the sites at which they differ.

    rules: the names of all rules that looked, also of those that found nothing.
    inputs: what the model was traced with, by name: "int64[batch, sequence] on cpu", "False".
    guards: what the trace took for granted, one readable line each.
    opaque: the modules that the trace could not enter, one readable line each.
    verified: what verify() found, None when it was not asked.
    changes: where the two are both optimised, what is rewritten in one of them alone.
    versions_before: the versions that the first of two reports was made with.
    blocks: the units that have graphs of their own; fallbacks: the calls that none served.
    """

    before: Side
    after: Side
    sites: tuple[Site, ...] = ()
    rules: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=lambda: versions())
    verified: Verified | None = None
    changes: tuple[SiteChange, ...] = ()
    versions_before: dict[str, str] = field(default_factory=dict)
    blocks: tuple[BlockRow, ...] = ()
    fallbacks: tuple[FallbackRow, ...] = ()

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """The sites at which a named module stands now."""
        return tuple(site for site in self.sites if site.reason is None)

    @property
    def refused(self) -> tuple[Site, ...]:
        """The sites that looked like one and were left as they were, each with its reason."""
        return tuple(site for site in self.sites if site.reason is not None)

    @property
    def lost(self) -> tuple[SiteChange, ...]:
        """The places at which something was rewritten in the first of two and is not any more."""
        return tuple(change for change in self.changes if change.lost)

    def with_verified(self, found: Verified) -> Self:
        """The report with what verify found: ``report.with_verified(verify(...).summary())``."""
        return replace(self, verified=found)


def versions() -> dict[str, str]:
    """The versions that a result depends on; a package that is not installed is left out."""
    found = {"liger_fx": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
