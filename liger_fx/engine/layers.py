"""What the rules for MLPs share: the linear layers of a match as children of one module."""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.engine.match import Match
from liger_fx.engine.rule import Owner, Reject

MLP_NAMES = r"(?i)MLP|FFN|FeedForward|Experts|Naive_?MoE"


def check_no_casts(match: Match) -> None:
    """Reject a match in which the dtype changes: a linear layer takes only its own."""
    for node in match.covered:
        term = match.view(node)
        if term.op == "cast" and term.operands[0].spec != term.spec:
            raise Reject("the dtype changes on the way", node)


def own_layers(match: Match, owner: Owner) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The owner's children captured as ``<role> layer``, in its order, and each role's name."""
    roles = {
        name.removesuffix(" layer"): owner.own_name(match[name])
        for name in match.constants
        if name.endswith(" layer")
    }
    if len(set(roles.values())) < len(roles):
        raise Reject("one linear layer has two roles", match.root)
    children = dict(owner.module.named_children())
    return {name: child for name, child in children.items() if name in roles.values()}, roles
