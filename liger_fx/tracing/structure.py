"""Whether the sizes that an operator's fake kernel asked about decide what its result is made of.

x.split(4) of 8 rows     two tensors; of 12 rows there are three          what was asked is guarded
x.squeeze() of 8 x 3     two dimensions; of 1 x 3 it is one               the same
x + y of 8 x 3           two dimensions, whichever of them are broadcast  forgotten

Found by running the operator at other sizes on tensors without data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from liger_fx.tracing.fakes import FakeWorld, Question


def follows_sizes(
    world: FakeWorld,
    questions: Iterable[Question],
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
) -> bool:
    """Whether ``run(*args, **kwargs)`` gives something else than as many tensors of as many
    dimensions as ``result`` where the sizes in the questions are others."""
    made_of = _made_of(result)
    for sizes in _other_sizes(world, questions):
        try:
            with unset_fake_temporarily(), torch.no_grad():
                given, named = pytree.tree_map(_at(sizes), (args, kwargs))
                other = run(*given, **named)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue  # no such call can be
        if _made_of(other) != made_of:
            return True
    return False


def _other_sizes(
    world: FakeWorld, questions: Iterable[Question]
) -> Iterator[dict[sympy.Symbol, int]]:
    """The trace's examples with one of the sizes that were asked about changed: to one, which is
    broadcast and dropped, and to more than there were."""
    examples = world.examples
    asked = dict.fromkeys(itertools.chain(*(q.expr.free_symbols for q in questions)))
    for symbol in sorted(asked.keys() & examples.keys(), key=str):
        for other in (1, 2 * examples[symbol] + 1):
            yield {**examples, symbol: other}


def _at(sizes: dict[sympy.Symbol, int]) -> Callable[[Any], Any]:
    def number(size: Any) -> int:
        return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else size

    def concrete(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            shape, strides = map(number, value.shape), map(number, value.stride())
            return torch.empty_strided(
                tuple(shape), tuple(strides), dtype=value.dtype, device="meta"
            )
        return number(value)

    return concrete


def _made_of(value: Any) -> Any:
    """How many tensors of how many dimensions; numbers as they are."""
    if isinstance(value, torch.Tensor):
        return value.ndim
    if isinstance(value, (tuple, list)):
        return tuple(map(_made_of, value))
    return value if isinstance(value, (bool, int, float)) else type(value)
