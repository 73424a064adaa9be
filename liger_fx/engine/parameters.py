"""The parameters of the module whose place a named module takes, as the match captured them."""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.engine.match import Match
from liger_fx.engine.rule import Owner, Reject
from liger_fx.engine.term import Term


def own_parameter(match: Match, owner: Owner, role: str) -> dict[str, Any]:
    """The owner's parameter that was captured as ``role``, and its name there, as options of a
    named module: {"weight": ..., "weight_name": "scale"}; nothing where none was captured.

    Reject what is no parameter of the owner itself.
    """
    if role not in match:
        return {}
    term: Term = match[role]
    if term.op != "get_attr":
        raise Reject(f"the {role} is computed, not a parameter", term.node)
    name = owner.own_name(term.attributes["path"])
    if name not in dict(owner.module.named_parameters(recurse=False)):
        raise Reject(f"the {role} is a buffer, not a parameter", term.node)
    return {role: owner.module.get_parameter(name), f"{role}_name": name}


def leaf_parameters(
    match: Match, owner: Owner, kind: type[nn.Module], *roles: str
) -> dict[str, Any]:
    """The parameters of a module of PyTorch's own, under its own names for them.

    Reject what is derived from that class: its parameters may be computed (parametrizations are).
    """
    if type(owner.module) is not kind:
        found = type(owner.module).__name__
        raise Reject(f"it is a {found}, not a plain {kind.__name__}", match.root)
    return {role: getattr(owner.module, role) for role in roles}
