"""liger-fx rules: the rules there are, a line each."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to those of liger-fx."""
    commands.add_parser("rules", help="list the rules").set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print each rule's name and the first line of its file."""
    from tabulate import tabulate

    from liger_fx.engine.rule import discover

    docs = {rule.name: sys.modules[type(rule).__module__].__doc__ or "" for rule in discover()}
    rows = [(name, doc.partition("\n")[0]) for name, doc in docs.items()]
    print(tabulate(rows, ("rule", "what it is for")))
    return 0
