"""What the MLP modules share: the original linear layers, under their original names."""

from collections.abc import Mapping

from torch import nn


def adopt(module: nn.Module, children: Mapping[str, nn.Module], **roles: str) -> None:
    """Register `children` with `module`, in order, and note which of them has which role.

    ValueError where a role names no child.
    """
    for role, name in roles.items():
        if name not in children:
            raise ValueError(f"{role}={name!r} is not among the children {list(children)}")
    for name, child in children.items():
        module.add_module(name, child)


def sizes(into: nn.Module, out_of: nn.Module) -> str | None:
    """ "hidden -> intermediate" of an MLP, where its linear layers tell."""
    hidden = getattr(into, "in_features", None)
    intermediate = getattr(out_of, "in_features", None)
    return None if hidden is None or intermediate is None else f"{hidden} -> {intermediate}"
