"""What optimize() did to a model, as facts (facts.py) and as text (text.py)."""

from liger_fx.report.facts import GraphDiff, Side, TreeRow

__all__ = ["GraphDiff", "Side", "TreeRow"]
