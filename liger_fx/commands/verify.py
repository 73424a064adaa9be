"""liger-fx verify: run a model, its optimised twin and a float64 reference, and compare.

    liger-fx verify llama --dtype bfloat16

Exit codes: 0 the optimised model is at least as accurate; 1 it is not, or with --strict a site was
missed; 2 it could not be done, one sentence on standard error says why.
"""

from __future__ import annotations

import argparse
from typing import Any

from liger_fx.commands.console import add_command, check_report_file, progress, save_report
from liger_fx.commands.models import add_rewriting, load, optimized, start, strictly


def add_parser(commands: Any) -> None:
    """Add the command to those of liger-fx."""
    parser = add_command(commands, "verify", "compare a rewritten model with float64", __doc__, run)
    add_rewriting(parser)
    parser.add_argument(
        "--report", metavar="FILE", help="write report and result to a .txt, .md, .json or .html"
    )


def run(arguments: argparse.Namespace) -> int:
    """Optimise, verify, print, write."""
    start()
    if arguments.report:
        check_report_file(arguments.report)
    model = load(arguments.model, arguments, weights=True)
    opt = optimized(model, arguments)
    from liger_fx.verification import verify

    with progress("running original, optimised and float64 reference"):
        found = verify(model, opt)
    print(found)
    if arguments.report:
        save_report(opt.report.with_verified(found.summary()), arguments.report)
    return strictly(arguments, opt.report) if found.ok else 1
