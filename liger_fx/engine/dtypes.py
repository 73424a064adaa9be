"""The dtype of a site's result, as the model has it and as a named module can give it."""

from __future__ import annotations

import torch
from torch import fx

from liger_fx.engine.match import Match
from liger_fx.engine.rule import Reject
from liger_fx.engine.term import Term
from liger_fx.modules.casting import Cast


def rounding(match: Match, value: Term, x: str, *factors: str) -> Cast:
    """Whether the result goes back to the dtype of ``x`` ("input") or has that of x * factors.

    Where the trace's dtypes leave both open, ``value``, the term of the result, decides: a cast
    at the very end goes back. Reject when the model's result has neither dtype.
    """
    by: torch.dtype | None = None
    for name in factors:
        if name in match:
            dtype = match.spec(name).dtype
            by = dtype if by is None else torch.promote_types(by, dtype)
    return rounded_to(match.root_spec.dtype, value, match.spec(x).dtype, by, match.root)


def rounded_to(
    result: torch.dtype, value: Term, x: torch.dtype, factor: torch.dtype | None, node: fx.Node
) -> Cast:
    """The same of dtypes: that of the result, of what comes in, and of what multiplies it, if
    anything does. node: what a Reject is about."""
    dtypes: dict[Cast, torch.dtype] = {
        "input": x, "promote": x if factor is None else torch.promote_types(x, factor)
    }  # fmt: skip
    goes_back = value.op == "cast" or factor is None
    order: tuple[Cast, ...] = ("input", "promote") if goes_back else ("promote", "input")
    for cast in order:
        if dtypes[cast] == result:
            return cast
    names = [str(d).removeprefix("torch.") for d in (result, *dtypes.values())]
    reason = f"the result is {names[0]}, neither the input's {names[1]} nor {names[2]}"
    raise Reject(reason, node)


def check_comes_back(match: Match, x: Term) -> None:
    """Reject a norm that goes up to float32 and stays there: in float32, which shows no difference,
    its module would look like one whose result has the dtype of what comes in."""
    casts = [term for term in map(match.view, match.covered) if term.op == "cast"]
    goes_up = any(match.view.same(cast.operands[0], x) for cast in casts)
    comes_back = any(cast.operands[0].op in _LATE for cast in casts)
    if goes_up and not comes_back:
        raise Reject("its result stays in float32, whatever comes in", match.root)


# What a norm's formula ends with, or has behind the sum over a row.
_LATE = ("add", "layer_norm", "mul", "rms_norm", "rsqrt")
