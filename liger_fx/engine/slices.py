"""The spellings of parts of a tensor, along its last dimension.

    x[..., :8], x.chunk(2, -1)[0], x.split([8, 8], -1)[0], x.narrow(-1, 0, 8)  ->  slice(x, 0, 8, 1)
    x[..., 0::2], x.view(.., n, 2)[..., 0], x.unflatten(-1, (n, 2)).unbind(-1)[0]
                                                                           ->  slice(x, 0, 15, 2)

Slices of slices become one slice of the innermost tensor, and unsqueeze moves outwards: a slice of
an unsqueezed cos is the unsqueezed slice of it. The terms in between then have no node.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from liger_fx.engine.spellings import argument
from liger_fx.engine.term import Term, target_name
from liger_fx.engine.view import View

Nodes = tuple[fx.Node, ...]


def take(
    view: View, x: Term, index: slice, node: fx.Node | None = None, hidden: Nodes = ()
) -> Term | None:
    """``x[..., index]``; None where the width of ``x`` is not known, or nothing is taken."""
    if x.width is None:
        return None
    places = range(x.width)[index]
    if not places or places.step < 1:
        return None
    if len(places) == x.width:
        return x if node is None else view.make("alias", (x,), node, hidden)
    if x.op == "alias":
        return take(view, x.operands[0], index, node, (*hidden, *x.nodes))
    if x.op == "slice":
        outer = range(x.attributes["start"], x.attributes["stop"], x.attributes["step"])
        combined, hidden = outer[index], (*hidden, *x.nodes)
        places, x = combined, x.operands[0]
    if x.op == "unsqueeze" and x.attributes["dim"] != -1:
        inner = take(view, x.operands[0], index)
        return inner and view.make("unsqueeze", (inner,), node, (*hidden, *x.nodes), **x.attributes)
    return _slice(view, x, places, node, hidden)


def _slice(
    view: View, x: Term, places: range, node: fx.Node | None = None, hidden: Nodes = ()
) -> Term:
    spec = x.spec and x.spec._replace(shape=(*x.spec.shape[:-1], len(places)))
    extent = {"start": places.start, "stop": places[-1] + 1, "step": places.step}
    return view.make("slice", (x,), node, hidden, spec=spec, **extent)


def whole(view: View, part: Term, which: str) -> Term | None:
    """The tensor whose lower, upper, even or odd half the slice is; None where there is none."""
    if part.op == "unsqueeze":
        inner = whole(view, part.operands[0], which)
        return inner and _known(view, part, view.make("unsqueeze", (inner,), **part.attributes))
    if part.op != "slice":
        return None
    base = part.operands[0]
    start, step = part.attributes["start"], part.attributes["step"]
    count = len(range(start, part.attributes["stop"], step))
    if which in ("even", "odd"):
        if step % 2:
            return None
        step //= 2
    start -= {"lower": 0, "upper": count * step, "even": 0, "odd": step}[which]
    stop = start + (2 * count - 1) * step + 1
    if base.width is None or start < 0 or stop > base.width:
        return None
    if (start, stop, step) == (0, base.width, 1):
        return base
    return _known(view, part, _slice(view, base, range(start, stop, step)))


def _known(view: View, part: Term, term: Term) -> Term:
    """The same value with its node, where the model has made it on the way to the part."""
    return next((view(node) for node in part.hidden if view.same(view(node), term)), term)


def lower_getitem(view: View, node: fx.Node) -> Term | None:
    source, index = node.args
    if not isinstance(source, fx.Node):
        return None
    if view.spec(source) is None:
        return _item_of_parts(view, node, source, index)
    rank = view.rank(source)
    items = list(index) if isinstance(index, tuple) else [index]
    if rank is None or sum(item is Ellipsis for item in items) > 1:
        return None
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        missing = rank - sum(item is not None for item in items) + 1
        items[at : at + 1] = [slice(None)] * missing
    else:
        items += [slice(None)] * (rank - sum(item is not None for item in items))
    telling = [(i - len(items), item) for i, item in enumerate(items) if item != slice(None)]
    if len(telling) != 1:
        return None
    (dim, item), x = telling[0], view(source)
    if item is None:
        return new_dim(view, node, x, dim)
    if type(item) is int:
        return _select(view, node, x, dim, item)
    if isinstance(item, slice) and dim == -1 and _is_static(item):
        return take(view, x, item, node)
    return None


def _is_static(index: slice) -> bool:
    return all(p is None or type(p) is int for p in (index.start, index.stop, index.step))


def _item_of_parts(view: View, node: fx.Node, source: fx.Node, index: Any) -> Term | None:
    """One result of chunk, split or unbind."""
    name = target_name(source)
    if name not in ("chunk", "split", "unbind") or type(index) is not int:
        return None
    x_node = argument(source, 0, "input", "tensor", "self")
    rank = view.rank(x_node)
    default_dim, place = (0, 1) if name == "unbind" else (0, 2)
    dim = argument(source, place, "dim", default=default_dim)
    if rank is None or type(dim) is not int:
        return None
    dim, x = dim - rank if dim >= 0 else dim, view(x_node)
    if name == "unbind":
        return _select(view, node, x, dim, index, (source,))
    size = argument(source, 1, "chunks", "split_size_or_sections", "split_size")
    if dim != -1 or x.width is None:
        return None
    bounds = _bounds(name, x.width, size)
    if bounds is None or not 0 <= index < len(bounds) - 1:
        return None
    return take(view, x, slice(bounds[index], bounds[index + 1]), node, (source,))


def _bounds(name: str, width: int, size: Any) -> list[int] | None:
    if isinstance(size, list | tuple):
        if not all(type(s) is int for s in size):
            return None
        return [sum(size[:i]) for i in range(len(size) + 1)]
    if type(size) is not int or size < 1:
        return None
    step = -(-width // size) if name == "chunk" else size
    return [*range(0, width, step), width]


def _select(
    view: View, node: fx.Node, x: Term, dim: int, index: int, hidden: Nodes = ()
) -> Term | None:
    """One place of a last dimension that was viewed as two."""
    if x.op != "unflatten" or index < 0:
        return None
    _, inner = x.attributes["sizes"]
    if dim == -1:
        places = slice(index, None, inner)
    elif dim == -2:
        places = slice(index * inner, (index + 1) * inner)
    else:
        return None
    return take(view, x.operands[0], places, node, (*hidden, *x.nodes))


def lower_narrow(view: View, node: fx.Node) -> Term | None:
    x, dim, start, length = (
        argument(node, i, name) for i, name in enumerate(("input", "dim", "start", "length"))
    )
    if not isinstance(x, fx.Node) or type(start) is not int or type(length) is not int:
        return None
    last = dim in (-1, (view.rank(x) or 0) - 1)
    return take(view, view(x), slice(start, start + length), node) if last else None


def new_dim(view: View, node: fx.Node, x: Term, dim: int) -> Term:
    """A dimension of size 1; where it is one that a reduction dropped, the reduction keeps it."""
    if x.op in ("mean", "sum") and dim == -1 and x.attributes == {"dims": (-1,), "keepdim": False}:
        return view.make(x.op, x.operands, node, x.nodes, dims=(-1,), keepdim=True)
    return view.make("unsqueeze", (x,), node, dim=dim)
