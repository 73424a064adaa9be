"""What the commands have in common: progress on standard error, the answer on standard output."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liger_fx.errors import UsageError, one_line

if TYPE_CHECKING:
    from liger_fx.report import GraphDiff


def add_command(
    commands: Any,
    name: str,
    summary: str,
    doc: str | None,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """A command's parser; its help is the docstring of the command's file."""
    title, _, rest = (doc or "").partition("\n\n")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=title,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def say(text: str) -> None:
    """A line for the person at the terminal, apart from the answer."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    start = time.perf_counter()
    say(f"==> {what}")
    yield
    say(f"    {time.perf_counter() - start:.1f} s")


def colors_are_welcome() -> bool:
    """Whether the answer goes to a terminal whose owner has not asked for plain text."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def check_report_file(path: str) -> None:
    """UsageError, before the long work, where ``save_report`` could not write."""
    from liger_fx.report.graph_diff import check_name

    check_name(path)
    check_file(path)


def check_file(path: str) -> None:
    """UsageError, before the long work, for a file in no directory, or that is one."""
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no such directory, or it is one.")


def save_report(report: GraphDiff, path: str) -> None:
    """Write a report to a file whose name says how; UsageError where that cannot be done."""
    from liger_fx.report.graph_diff import check_name

    write(report.face(check_name(path)), path)
    say(f"    the report is in {path}")


def write(text: str, path: str) -> None:
    """Write a file; UsageError where that cannot be done."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {one_line(error)}.") from error
