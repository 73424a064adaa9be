"""The dtype of a site's result, as the model has it and as a named module can give it."""

from __future__ import annotations

import torch

from liger_fx.engine.match import Match
from liger_fx.engine.rule import Reject
from liger_fx.engine.term import Term
from liger_fx.modules.casting import Cast


def rounding(match: Match, value: Term, x: str, factor: str) -> Cast:
    """Whether the result goes back to the dtype of ``x`` ("input") or has that of x * factor.

    Where the trace's dtypes leave both open, ``value``, the term of the result, decides: a cast
    at the very end goes back. Reject when the model's result has neither dtype.
    """
    input_dtype = product = match.spec(x).dtype
    if factor in match:
        product = torch.promote_types(input_dtype, match.spec(factor).dtype)
    dtypes: dict[Cast, torch.dtype] = {"input": input_dtype, "promote": product}
    goes_back = value.op == "cast" or factor not in match
    order: tuple[Cast, ...] = ("input", "promote") if goes_back else ("promote", "input")
    for cast in order:
        if dtypes[cast] == match.root_spec.dtype:
            return cast
    names = [str(d).removeprefix("torch.") for d in (match.root_spec.dtype, input_dtype, product)]
    reason = f"the result is {names[0]}, neither the input's {names[1]} nor {names[2]}"
    raise Reject(reason, match.root)
