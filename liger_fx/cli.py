"""The command line: look at what liger_fx does to a model, and prove it.

    liger-fx optimize llama          a tiny random Llama: the report, and the module tree in it
    liger-fx optimize ./my-model     a directory with a config.json, with or without weights
    liger-fx verify llama            outputs and gradients against float64, site by site
    liger-fx rules                   the rules there are

Exit codes: 0 done; 1 done, and the answer is no (verify failed, or --strict and a site was missed);
2 it could not be done, one sentence on standard error says why; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from liger_fx.errors import LigerFxError, LigerFxWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from liger_fx.report import GraphDiff

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; nothing but Python's own errors is raised."""
    arguments = _parser().parse_args(argv)
    try:
        with _warnings_as_lines():
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except LigerFxError as error:
        _say(f"liger-fx: {error}")
        return 2
    except KeyboardInterrupt:
        _say("liger-fx: interrupted")
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    optimize = commands.add_parser("optimize", help="rewrite a model and print the report")
    _add_model_arguments(optimize)
    optimize.add_argument("--full", action="store_true", help="list every layer, fold none")
    optimize.set_defaults(run=_optimize)
    verify = commands.add_parser("verify", help="compare a rewritten model with float64")
    _add_model_arguments(verify)
    verify.set_defaults(run=_verify)
    rules = commands.add_parser("rules", help="list the rules")
    rules.set_defaults(run=_rules)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="DIR_OR_ARCH",
        help="a model directory, or a transformers model type (llama): a tiny random model of it",
    )
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="apply these rules only")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="rules or module paths to leave"
    )
    parser.add_argument("--strict", action="store_true", help="fail when a site is not rewritten")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's, else float32")
    parser.add_argument("--layers", type=_positive, metavar="N", help="make it N layers deep")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of layers")
    return number


def _optimize(arguments: argparse.Namespace) -> int:
    _, opt = _rewritten(arguments, weights=False)
    print(opt.report.text(full=arguments.full))
    return _strictly(arguments, opt.report)


def _verify(arguments: argparse.Namespace) -> int:
    from liger_fx.verification import verify

    model, opt = _rewritten(arguments, weights=True)
    with _progress("running original, optimised and float64 reference"):
        found = verify(model, opt)
    print(found)
    return _strictly(arguments, opt.report) if found.ok else 1


def _rules(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    from liger_fx.engine.rule import discover

    docs = {rule.name: sys.modules[type(rule).__module__].__doc__ or "" for rule in discover()}
    rows = [(name, doc.partition("\n")[0]) for name, doc in docs.items()]
    print(tabulate(rows, ("rule", "what it is for")))
    return 0


def _rewritten(arguments: argparse.Namespace, weights: bool) -> tuple[PreTrainedModel, Any]:
    """The model that was asked for, and its optimised twin."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on the disk or made here
    with _progress("starting PyTorch and transformers"):
        import transformers

        from liger_fx.api import optimize
        from liger_fx.loading import load_model

        transformers.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()
    with _progress(f"reading {arguments.model}"):
        model, notes = load_model(arguments.model, arguments.dtype, arguments.layers, weights)
    for note in notes:
        _say(f"    {note}")
    with _progress(f"tracing and rewriting {type(model).__name__}"):
        opt = optimize(model, rules=arguments.rules, exclude=arguments.exclude)
    return model, opt


def _strictly(arguments: argparse.Namespace, report: GraphDiff) -> int:
    """1 if --strict was given and a site was missed; what was missed stands in the report."""
    if not arguments.strict or (report.rewritten and not report.refused):
        return 0
    _say(f"liger-fx: --strict: {len(report.refused)} of {len(report.sites)} sites not rewritten")
    return 1


@contextmanager
def _progress(what: str) -> Iterator[None]:
    start = time.perf_counter()
    _say(f"==> {what}")
    yield
    _say(f"    {time.perf_counter() - start:.1f} s")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Our own warnings as one line each, without the place in the code that Python prints."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, LigerFxWarning):
                _say(f"liger-fx: warning: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.simplefilter("always", LigerFxWarning)
        warnings.showwarning = show_line
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
