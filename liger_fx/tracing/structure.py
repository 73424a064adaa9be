"""Whether the sizes that an operator's fake kernel asked about decide what its result is made of.

x.split(4) of 8 rows     two tensors; of 12 rows there are three          what was asked is guarded
x.squeeze() of 8 x 3     two dimensions; of 1 x 3 it is one               the same
x[:4] of 8 rows          four rows; of 3 there are three                  the same
x + y of 8 x 3           two dimensions, whichever of them are broadcast  forgotten

Found by running the operator at other sizes on tensors without data. In the same way it is found
whether one gives its argument itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from liger_fx.tracing.fakes import FakeWorld, Question, as_expr, settled

_FAR = (1 << 8, 1 << 16)


def follows_sizes(
    world: FakeWorld,
    questions: Iterable[Question],
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
) -> bool:
    """Whether ``run(*args, **kwargs)`` gives something else than as many tensors of as many
    dimensions as ``result`` where the sizes in the questions are others, or of other sizes than
    ``result`` says.

    (Of a size that the graph alone can tell, and no module's result has, no guard could be made; a
    cache's length is one. The operators that follow raise where it does not fit.)
    """
    asked = set(itertools.chain(*(question.expr.free_symbols for question in questions)))
    sizes_count = asked <= world.told
    # How many parts or rows there are may change far above the example: split(512) of 3 rows is
    # one part.
    far = _FAR if sizes_count or isinstance(result, (tuple, list)) else ()
    for sizes in other_sizes(world, asked, far):
        try:
            with unset_fake_temporarily(), torch.no_grad():
                given, named = pytree.tree_map(_at(sizes), (args, kwargs))
                other = run(*given, **named)
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError):
            continue  # no such call can be
        if made_of(other) != made_of(result):
            return True
        if sizes_count and world.ties_hold(sizes) and shapes_of(other) != shapes_of(result, sizes):
            return True
    return False


def gives_argument_back(
    world: FakeWorld, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether ``run(*args, **kwargs)`` gives one of its tensors itself (``x.float()`` of floats),
    which an operator's fake kernel need not do."""
    try:
        with unset_fake_temporarily(), no_python_dispatcher(), torch.no_grad():
            given, named = pytree.tree_map(_at(world.examples), (args, kwargs))
            result = run(*given, **named)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError):
        return False  # what cannot run without data computes from it
    before = {id(leaf) for leaf in pytree.tree_leaves((given, named))}
    found = pytree.tree_leaves(result)
    return any(isinstance(leaf, torch.Tensor) and id(leaf) in before for leaf in found)


def other_sizes(
    world: FakeWorld, asked: Iterable[Any], far: tuple[int, ...] = ()
) -> Iterator[dict[sympy.Symbol, int]]:
    """The trace's examples with one of these sizes changed: to one, which is broadcast and dropped,
    to more than there were, and to that plus each of ``far``."""
    examples = world.examples
    for symbol in sorted(examples.keys() & set(asked), key=str):
        for other in (1, *(examples[symbol] + more for more in (1, *far))):
            yield {**examples, symbol: other}


def number_at(size: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """What a symbolic number is at these sizes, also if the code fixed it since; anything else as
    it is."""
    return int(size.node._expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else size


def _at(sizes: Mapping[sympy.Symbol, int]) -> Callable[[Any], Any]:
    def concrete(value: Any) -> Any:
        if isinstance(value, slice):
            return slice(*map(concrete, (value.start, value.stop, value.step)))
        if not isinstance(value, FakeTensor):
            return number_at(value, sizes)
        shape, strides = (
            tuple(number_at(n, sizes) for n in numbers) for numbers in (value.shape, value.stride())
        )
        return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")

    return concrete


def shapes_of(value: Any, sizes: Mapping[sympy.Symbol, int] = MappingProxyType({})) -> list[Any]:
    """The shapes of the tensors in a result, as they are said to be at these sizes."""
    tensors = (t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))
    return [tuple(settled(as_expr(size), sizes) for size in t.shape) for t in tensors]


def made_of(value: Any) -> Any:
    """How many tensors of how many dimensions; numbers as they are."""
    if isinstance(value, torch.Tensor):
        return value.ndim
    if isinstance(value, (tuple, list)):
        return tuple(map(made_of, value))
    if isinstance(value, dict):
        return tuple((key, made_of(item)) for key, item in value.items())
    return value if isinstance(value, (bool, int, float)) else type(value)
