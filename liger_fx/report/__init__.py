"""What optimize() did to a model: the facts (facts.py), and the report that shows them
(graph_diff.py)."""

from liger_fx.report.facts import Side, TreeRow
from liger_fx.report.graph_diff import GraphDiff

__all__ = ["GraphDiff", "Side", "TreeRow"]
