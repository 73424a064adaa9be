"""The command line: look at what liger_fx does to a model, prove it, compare and explain.

    liger-fx optimize llama          a tiny random Llama: the report, and the module tree in it
    liger-fx optimize ./my-model     a directory with a config.json, with or without weights
    liger-fx verify llama            outputs and gradients against float64, site by site
    liger-fx diff old.json new.json  what differs between models, saved graphs or reports
    liger-fx explain llama --site model.layers.0.mlp
                                     why a site did or did not match, step by step
    liger-fx bench ./my-model        a training step of it and of its optimised twin, timed
    liger-fx rules                   the rules there are

Exit codes: 0 done; 1 done, and the answer is no (verify failed; --strict and a site was missed;
--fail-on-lost and a site is lost); 2 it could not be done, one sentence on standard error says why;
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from liger_fx import __version__
from liger_fx.commands import bench, diff, explain, optimize, rules, verify
from liger_fx.commands.console import say
from liger_fx.errors import LigerFxError, LigerFxWarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; nothing but Python's own errors is raised."""
    arguments = _parser().parse_args(argv)
    try:
        with _warnings_as_lines():
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except LigerFxError as error:
        say(f"liger-fx: {error}")
        return 2
    except KeyboardInterrupt:
        say("liger-fx: interrupted")
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "liger-fx",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"liger_fx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (optimize, verify, diff, explain, bench, rules):
        command.add_parser(commands)
    return parser


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Our own warnings as one line each, without the place in the code that Python prints."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, LigerFxWarning):
                say(f"liger-fx: warning: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.simplefilter("always", LigerFxWarning)
        warnings.showwarning = show_line
        yield
