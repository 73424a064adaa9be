"""liger-fx explain: why a site did or did not match, step by step.

    liger-fx explain llama --site model.layers.0.mlp
    liger-fx explain ./my-model --site model.layers.3.self_attn --rules rotary_embedding

For each rule that has something to say of the module: what of its pattern fits which node, down to
the node where pattern and graph part.

Exit codes: 0 told; 2 it could not be done, one sentence on standard error says why.
"""

from __future__ import annotations

import argparse
import difflib
from typing import TYPE_CHECKING, Any

from liger_fx.commands.console import add_command, progress
from liger_fx.commands.models import add_making, add_model, load, start
from liger_fx.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from liger_fx.engine.rule import Rule
    from liger_fx.tracing.trace import Trace


def add_parser(commands: Any) -> None:
    """Add the command to those of liger-fx."""
    summary = "why a site did or did not match, step by step"
    parser = add_command(commands, "explain", summary, __doc__, run)
    add_model(parser)
    parser.add_argument("--site", required=True, metavar="PATH", help="the path of a module")
    add_making(parser)
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="tell of these rules only")


def run(arguments: argparse.Namespace) -> int:
    """Trace, rewrite under observation, tell."""
    start()
    from liger_fx.engine.explain import explain
    from liger_fx.engine.rule import discover
    from liger_fx.report.explanation import render

    rules = discover()
    wanted = _wanted(rules, arguments.rules)
    model = load(arguments.model, arguments, weights=False)
    _check_site(model, arguments.site)
    with progress(f"tracing and rewriting {type(model).__name__}"):
        trace = _trace(model)
        module = trace.root.get_submodule(arguments.site)
        name = type(module).__name__
        accounts, sites = explain(trace, rules, arguments.site)
    accounts = [account for account in accounts if account.rule in wanted]
    kin = [rule.name for rule in rules if rule.name in wanted and rule.knows(name)]
    if arguments.rules:
        kin = wanted
    elif any(site.path == arguments.site and site.after for site in sites):
        kin = []  # its name has kept its promise: what else it might have been is of no interest
    print(f"{arguments.site or 'the model'}: {name}{_inside(trace, arguments.site)}\n")
    print(render(accounts, sites, arguments.site, kin))
    below = [s for s in sites if s.path.startswith(f"{arguments.site}.")]
    if below:
        print("\nSites further inside, each of which can be explained by itself")
        for site in below:
            print(f"  {site.path} ({site.rule}): {site.after_class or site.reason}")
    return 0


def _wanted(rules: list[Rule], chosen: list[str] | None) -> list[str]:
    """The names of the rules to tell of."""
    known = [rule.name for rule in rules]
    for name in chosen or ():
        if name not in known:
            raise UsageError(f"{name!r} is no rule; there are {', '.join(known)}.")
    return chosen or known


def _check_site(model: nn.Module, path: str) -> None:
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if path not in paths:
        near = difflib.get_close_matches(path, paths, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{path!r} is no module of this {type(model).__name__}.{hint}")


def _trace(model: nn.Module) -> Trace:
    from liger_fx.inputs import example_arguments
    from liger_fx.model.tree import copy_tree
    from liger_fx.tracing.naming import describe_call
    from liger_fx.tracing.retry import trace_block

    tree = copy_tree(model)  # one flat graph: a site may lie anywhere in it
    return trace_block(tree, describe_call(tree, example_arguments(model, None), inner=False))


def _inside(trace: Trace, path: str) -> str:
    """What the trace has to say of the module, if that is more than nodes."""
    for leaf in trace.opaque:
        if path == leaf.path or path.startswith(f"{leaf.path}."):
            return f"\nThe trace could not enter {leaf}"
    called = {call.path for call in trace.calls}
    called |= {str(node.target) for node in trace.graph.nodes if node.op == "call_module"}
    return "" if path in called else "\nThe graph does not call it."
