"""The models that commands are about: how they are named on the command line, and made.

liger-fx optimize llama --layers 2   ->   a tiny random Llama of 2 layers, and its optimised twin
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from liger_fx.commands.console import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from liger_fx.report import GraphDiff

_DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model that a command is about."""
    parser.add_argument(
        "model",
        metavar="DIR_OR_ARCH",
        help="a model directory, or a transformers model type (llama): a tiny random model of it",
    )


def add_making(parser: argparse.ArgumentParser) -> None:
    """How models are made."""
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's, else float32")
    parser.add_argument("--layers", type=positive, metavar="N", help="make it N layers deep")


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """What is rewritten in them."""
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="apply these rules only")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="rules or module paths to leave"
    )


def add_rewriting(parser: argparse.ArgumentParser) -> None:
    """All of these, for a command that rewrites a model and judges the result."""
    add_model(parser)
    add_making(parser)
    add_choosing(parser)
    parser.add_argument("--strict", action="store_true", help="fail when a site is not rewritten")


def strictly(arguments: argparse.Namespace, report: GraphDiff) -> int:
    """1 if --strict was given and a site was missed; what was missed stands in the report."""
    if not arguments.strict or (report.rewritten and not report.refused):
        return 0
    say(f"liger-fx: --strict: {len(report.refused)} of {len(report.sites)} sites not rewritten")
    return 1


def positive(text: str) -> int:
    """A number from 1 on, of an option."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def start() -> None:
    """Import what takes seconds, and keep transformers from the network and from chatting."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on the disk or made here
    with progress("starting PyTorch and transformers"):
        import transformers

        import liger_fx.api  # noqa: F401

        transformers.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()


def load(where: str, arguments: argparse.Namespace, weights: bool) -> PreTrainedModel:
    """The model at ``where``; without ``weights``, one of random weights is on the meta device."""
    from liger_fx.loading import load_model

    with progress(f"reading {where}"):
        model, notes = load_model(where, arguments.dtype, arguments.layers, weights)
    for note in notes:
        say(f"    {note}")
    return model


def optimized(model: PreTrainedModel, arguments: argparse.Namespace) -> Any:
    """The model's optimised twin."""
    from liger_fx.api import optimize

    with progress(f"tracing and rewriting {type(model).__name__}"):
        return optimize(model, rules=arguments.rules, exclude=arguments.exclude)
