"""Sites that are alike, as one.

64 norms of 32 layers, the same nodes, shapes and constants   ->   Kind(sites=(...), where=
    "model.layers.0-31.input_layernorm, model.layers.0-31.post_attention_layernorm")
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from liger_fx.engine.site import Site
from liger_fx.report.folding import ROOT, alike, fold, fold_paths


@dataclass(frozen=True)
class Kind:
    """Alike sites; whatever holds for ``example`` holds for each of them, but for its path."""

    sites: tuple[Site, ...]

    @property
    def example(self) -> Site:
        """The first of them."""
        return self.sites[0]

    @property
    def where(self) -> str:
        """All paths, folded."""
        return fold_paths(site.path or ROOT for site in self.sites)

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.sites)


def kinds(sites: Iterable[Site], full: bool = False) -> list[Kind]:
    """The sites by kind, in the order in which each kind first appears; ``full`` folds none."""
    if full:
        return [Kind((site,)) for site in sites]
    return [Kind(tuple(group)) for group in fold(sites, key=kind_of)]


def kind_of(site: Site) -> Hashable:
    """Equal for alike sites: the same rule, class, nodes and result or reason."""
    nodes = site.drawing or tuple(map(alike, site.before))
    return site.rule, site.before_class, site.after_class, nodes, alike(site.reason or "")


def source_text(site: Site) -> str:
    """The file's name and the line: modeling_llama.py:67; empty when unknown."""
    return line_text(site.source)


def line_text(source: tuple[str, int] | None) -> str:
    """The same for a file and a line."""
    if source is None:
        return ""
    file, line = source
    return f"{file.replace(chr(92), '/').rpartition('/')[2]}:{line}"
