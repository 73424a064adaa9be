"""liger-fx optimize: rewrite a model and show the report.

    liger-fx optimize llama --layers 2               on the terminal
    liger-fx optimize ./my-model --report out.html   and in a file: .txt, .md, .json or .html
    liger-fx optimize llama --layers 1 --graph       and the whole as one flat graph

Exit codes: 0 done; 1 with --strict, if a site was missed or nothing was rewritten; 2 it could not
be done, one sentence on standard error says why.
"""

from __future__ import annotations

import argparse
from typing import Any

from liger_fx.commands.console import (
    add_command,
    check_report_file,
    colors_are_welcome,
    save_report,
)
from liger_fx.commands.models import add_rewriting, load, optimized, start, strictly


def add_parser(commands: Any) -> None:
    """Add the command to those of liger-fx."""
    parser = add_command(commands, "optimize", "rewrite a model and show the report", __doc__, run)
    add_rewriting(parser)
    parser.add_argument("--full", action="store_true", help="list every layer, fold none")
    parser.add_argument(
        "--graph", action="store_true", help="print the whole as one flat graph, too"
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write the report to a .txt, .md, .json or .html file, too"
    )


def run(arguments: argparse.Namespace) -> int:
    """Optimise, print, write."""
    start()
    if arguments.report:
        check_report_file(arguments.report)
    opt = optimized(load(arguments.model, arguments, weights=False), arguments)
    print(opt.report.text(full=arguments.full, color=colors_are_welcome()))
    if arguments.graph:
        from liger_fx.model.flatten import flatten

        print(flatten(opt).code)
    if arguments.report:
        save_report(opt.report, arguments.report)
    return strictly(arguments, opt.report)
