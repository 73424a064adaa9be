"""liger-fx diff A B: what differs between any two models, saved graphs or reports.

    liger-fx diff llama optimized:llama             a model and its optimised twin
    liger-fx diff old-graph/ ./my-model             a saved graph and a plain model
    liger-fx diff old.json new.json --fail-on-lost  two reports, in CI after an upgrade

Exit codes: 0 done; 1 with --fail-on-lost, if a site that A rewrites is not rewritten in B; 2 it
could not be done, one sentence on standard error says why.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liger_fx.commands.console import (
    add_command,
    check_file,
    check_report_file,
    colors_are_welcome,
    progress,
    save_report,
    say,
    write,
)
from liger_fx.commands.models import add_choosing, add_making, load, optimized, start
from liger_fx.errors import UsageError, one_line

if TYPE_CHECKING:
    from liger_fx.report import GraphDiff
    from liger_fx.report.between import Subject

_OPTIMIZED = "optimized:"
_WHAT = f"""a report (a .json file that optimize --report wrote), a saved graph (a directory with a
graph.json), a model directory, or a transformers model type (llama); with {_OPTIMIZED} before a
model, its optimised twin"""


def add_parser(commands: Any) -> None:
    """Add the command to those of liger-fx."""
    summary = "what differs between two models, saved graphs or reports"
    parser = add_command(commands, "diff", summary, __doc__, run)
    parser.add_argument("a", metavar="A", help=_WHAT)
    parser.add_argument("b", metavar="B", help="the same")
    add_making(parser)
    add_choosing(parser)
    parser.add_argument(
        "--fail-on-lost", action="store_true", help="exit with 1 if B rewrites less than A"
    )
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "json", "html"),
        help="default: what the end of FILE says, else text",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write to a file")
    parser.add_argument("--full", action="store_true", help="list every layer, fold none")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print or write, and judge."""
    if not (_is_file(arguments.a) and _is_file(arguments.b)):
        start()
    if arguments.output:
        (check_file if arguments.format else check_report_file)(arguments.output)
    a, b = (_subject(text, arguments) for text in (arguments.a, arguments.b))
    from liger_fx.report.between import compare

    if arguments.fail_on_lost and (a.report is None or b.report is None):
        plain = arguments.a if a.report is None else arguments.b
        raise UsageError(f"--fail-on-lost compares what is rewritten; {plain} was not optimised.")
    diff = compare(a, b)
    _show(diff, arguments)
    if not arguments.fail_on_lost:
        return 0
    for change in diff.lost:
        why = change.reason or "nothing like it is there any more"
        say(f"liger-fx: lost: {change.path} ({change.rule}, {change.before}): {why}")
    return 1 if diff.lost else 0


def _show(diff: GraphDiff, arguments: argparse.Namespace) -> None:
    if arguments.format is None and arguments.output:
        save_report(diff, arguments.output)
        return
    style = arguments.format or "text"
    if style == "text":
        colored = not arguments.output and colors_are_welcome()
        text = diff.text(full=arguments.full, color=colored)
    else:
        text = diff.face(style)
    if arguments.output:
        write(text, arguments.output)
    else:
        print(text)


def _is_file(text: str) -> bool:
    return Path(text).is_file()


def _subject(text: str, arguments: argparse.Namespace) -> Subject:
    """What stands for one of the two on the command line."""
    from liger_fx.report.between import Subject

    name = text.removeprefix(_OPTIMIZED)
    if _is_file(text):
        return Subject.of_report(_report(Path(text)))
    if (Path(text) / "graph.json").is_file():
        return _saved(Path(text))
    model = load(name, arguments, weights=False)
    from liger_fx.api import subject_of, trace

    if name != text:
        return subject_of(optimized(model, arguments))

    with progress(f"tracing {type(model).__name__}"):
        return subject_of(trace(model))


def _report(path: Path) -> GraphDiff:
    from liger_fx.report import GraphDiff

    try:
        return GraphDiff.from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}.") from error


def _saved(path: Path) -> Subject:
    """A saved graph by its report, which needs no weights; one of a plain trace has none."""
    from liger_fx.report.between import Subject

    if (path / "report.json").is_file():
        return Subject.of_report(_report(path / "report.json"))
    from liger_fx.api import subject_of
    from liger_fx.storage.load import load as load_graph

    with progress(f"loading {path}"):
        return subject_of(load_graph(path))
