"""What rules share about linear layers: as children of one module, or taken apart to a weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.engine.match import Match
from liger_fx.engine.rule import Owner, Reject
from liger_fx.engine.term import Term
from liger_fx.tracing.trace import TensorSpec
from liger_fx.tracing.tree_state import hooks_of

MLP_NAMES = r"(?i)MLP|FFN|FeedForward|Experts|Naive_?MoE"


def check_no_casts(match: Match) -> None:
    """Reject a match in which the dtype changes: a linear layer takes only its own."""
    for node in match.covered:
        term = match.view(node)
        if term.op == "cast" and term.operands[0].spec != term.spec:
            raise Reject("the dtype changes on the way", node)


def layer_paths(match: Match) -> dict[str, str]:
    """The paths of the linear layers that the match captured as ``<role> layer``, by role."""
    captured = {k: v for k, v in match.constants.items() if k.endswith(" layer")}
    if None in captured.values():
        raise Reject("a linear layer is a call of F.linear, not a module", match.root)
    if len(set(captured.values())) < len(captured):
        raise Reject("one linear layer has two roles", match.root)
    return {name.removesuffix(" layer"): path for name, path in sorted(captured.items())}


def layer_results(match: Match) -> dict[str, TensorSpec]:
    """What the match's linear layers give, by role."""
    specs = {node.target: node.meta["spec"] for node in match.covered if node.op == "call_module"}
    return {role: specs[path] for role, path in layer_paths(match).items() if path in specs}


def own_layers(match: Match, owner: Owner) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The owner's children that are the match's layers, in its order, and the name of each role."""
    roles = {role: owner.own_name(path) for role, path in layer_paths(match).items()}
    children = dict(owner.module.named_children())
    return {name: child for name, child in children.items() if name in roles.values()}, roles


def plain_linear(match: Match, path: str) -> nn.Linear:
    """The linear layer at a path, if a call of it would read its parameters and do no more.

    Reject an adapted, quantised or tensor-parallel one, and one that a hook stands on.
    """
    layer = match.view.module(path)
    if type(layer) is not nn.Linear:
        raise Reject(f"{path} is a {type(layer).__name__}, not a plain linear layer", match.root)
    if "forward" in vars(layer) or any(hooks_of(layer)):
        raise Reject(f"a hook stands on {path}, which would not run", match.root)
    if any(type(p) is not nn.Parameter for p in layer.parameters()):
        raise Reject(f"the weight of {path} is no plain tensor", match.root)
    return layer


def parameters_of(match: Match, path: str) -> list[Term]:
    """The parameters of the leaf module at a path, as values to pass to a named module."""
    found = match.view.module(path).named_parameters()
    specs = {name: TensorSpec(tuple(p.shape), p.dtype, p.device) for name, p in found}
    return [
        match.view.make("get_attr", (), spec=spec, path=f"{path}.{name}")
        for name, spec in specs.items()
    ]
