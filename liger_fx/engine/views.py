"""The spellings of views and of joining tensors.

torch.stack((a, b), -1).flatten(-2)                  ->  interleave(a, b)
x.view(.., n, 2).transpose(-1, -2).reshape(x.shape)  ->  deinterleave(x)
x.view(.., 2, n), x.unflatten(-1, (2, n))            ->  unflatten(x, sizes=(2, n))
c[:, None], c.unsqueeze(1)                           ->  unsqueeze(c, dim=-3)
x.view(-1, width)                                    ->  rows(x)
torch.cat([a, b], 3), torch.concat((a, b), -1)       ->  cat(a, b, dim=-1)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from liger_fx.engine.slices import lower_getitem, lower_narrow, new_dim
from liger_fx.engine.spellings import Lowering, argument
from liger_fx.engine.term import Term
from liger_fx.engine.view import View


def _reshape(view: View, node: fx.Node) -> Term | None:
    """A view that splits the last dimension in two, or joins the last two, or does nothing."""
    x_node = argument(node, 0, "input", "self")
    before, after = view.spec(x_node), view.spec(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if before.shape == after.shape:
        return view.make("alias", (x_node,), node)
    sizes = after.shape[-2:]
    if before.shape[:-1] == after.shape[:-2] and all(type(size) is int for size in sizes):
        return view.make("unflatten", (x_node,), node, sizes=sizes)
    if len(after.shape) == 2 and before.shape[-1] == after.shape[-1]:
        return view.make("rows", (x_node,), node)
    if before.shape[:-2] != after.shape[:-1]:
        return None
    x = view(x_node)
    if x.op == "stack":
        if x.attributes["dim"] == -1:
            return view.make("interleave", x.operands, node, x.nodes)
        if x.attributes["dim"] == -2:
            return view.make("cat", x.operands, node, x.nodes, dim=-1)
    if x.op == "transpose" and x.attributes["dims"] == (-2, -1):
        inner = x.operands[0]
        if inner.op == "unflatten" and inner.attributes["sizes"][1] == 2:
            return view.make("deinterleave", inner.operands, node, (*x.nodes, *inner.nodes))
    return None


def _joined(op: str) -> Lowering:
    def lower(view: View, node: fx.Node) -> Term | None:
        parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", default=0)
        rank = view.rank(node)
        if rank is None or type(dim) is not int or not isinstance(parts, list | tuple):
            return None
        return view.make(op, tuple(parts), node, dim=dim - rank if dim >= 0 else dim)

    return lower


def _transpose(view: View, node: fx.Node) -> Term | None:
    rank, dims = view.rank(node), (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
    if rank is None or not all(type(d) is int for d in dims):
        return None
    from_end = tuple(sorted(d - rank if d >= 0 else d for d in dims))
    return view.make("transpose", (argument(node, 0, "input"),), node, dims=from_end)


def _unsqueeze(view: View, node: fx.Node) -> Term | None:
    rank, dim = view.rank(node), argument(node, 1, "dim")
    if rank is None or type(dim) is not int:
        return None
    return new_dim(view, node, view(argument(node, 0, "input")), dim - rank if dim >= 0 else dim)


def _repeat_interleave(view: View, node: fx.Node) -> Term | None:
    x_node, repeats = argument(node, 0, "input", "self"), argument(node, 1, "repeats")
    dim, rank = argument(node, 2, "dim"), view.rank(node)
    if type(repeats) is not int or type(dim) is not int or rank is None:
        return None
    if (dim - rank if dim >= 0 else dim) != -1:
        return None
    x = view(x_node)
    if x.op == "unsqueeze" and x.attributes["dim"] != -1:
        inner = view.make("repeat_interleave", x.operands, repeats=repeats)
        return view.make("unsqueeze", (inner,), node, x.nodes, **x.attributes)
    return view.make("repeat_interleave", (x,), node, repeats=repeats)


_TABLE: list[tuple[Lowering, tuple[str, ...], tuple[Any, ...]]] = [
    (lower_getitem, ("slice", "alias", "unsqueeze", "mean", "sum"), (operator.getitem,)),
    (lower_narrow, ("slice",), (torch.narrow, "narrow")),
    (
        _reshape,
        ("alias", "unflatten", "rows", "interleave", "cat", "deinterleave"),
        ("view", "reshape", torch.reshape, "flatten", torch.flatten, "unflatten", "view_as"),
    ),
    (_joined("cat"), ("cat",), (torch.cat, torch.concat, torch.concatenate)),
    (_joined("stack"), ("stack",), (torch.stack,)),
    (_transpose, ("transpose",), ("transpose", torch.transpose, "swapaxes", "swapdims")),
    (_unsqueeze, ("unsqueeze", "mean", "sum"), ("unsqueeze", torch.unsqueeze)),
    (
        _repeat_interleave,
        ("repeat_interleave", "unsqueeze"),
        ("repeat_interleave", torch.repeat_interleave),
    ),
]

VIEWS = {target: (lower, ops) for lower, ops, targets in _TABLE for target in targets}
