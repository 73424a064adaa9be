"""Bytes in words, for each token and for each call, and what the rewritten sites save together.

Bytes(2328, 128) -> Bytes(256, 128)     "2,328 B -> 256 B"
"""

from __future__ import annotations

from collections.abc import Iterable

from liger_fx.engine.drawing import Bytes, Cost
from liger_fx.engine.site import Site

ASSUMPTIONS = (
    "Bytes are worked out from shapes and dtypes, not measured.",
    "They are for the forward pass and one token: a size that varies from call to call counts as "
    "one. What a call costs whatever its tokens (reading weights, say) is told where it changes.",
    "Before: each operator reads its tensors once and writes its result once; a view moves "
    "nothing; kept is what autograd saves for the backward pass, each memory once.",
    "After: linear layers as before; the rest is one kernel that reads what comes in and writes "
    "what goes out, keeps what it came from and computes the rest again in the backward pass.",
    "A loss that takes its linear layer in passes the logits through memory once, in parts, and "
    "keeps the gradients of what comes in and of the weight.",
    "All parameters are taken to be trained; they are not counted as kept.",
)


def totals(sites: Iterable[Site]) -> tuple[Cost, Cost]:
    """What the rewritten sites cost together, before and after."""
    nothing = Bytes(0, 0)
    before, after = Cost(nothing, nothing), Cost(nothing, nothing)
    for site in sites:
        drawing = site.drawing
        if drawing is not None and drawing.cost_before and drawing.cost_after:
            before = _plus(before, drawing.cost_before)
            after = _plus(after, drawing.cost_after)
    return before, after


def _plus(a: Cost, b: Cost) -> Cost:
    return Cost(a.traffic + b.traffic, a.saved + b.saved)


def size(count: int) -> str:
    """A number of bytes in the largest unit in which it is ten or more."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(count) >= 10 * 1024**power:
            return f"{count / 1024**power:,.1f} {unit}"
    return f"{count:,} B"


def change(before: Bytes, after: Bytes) -> str:
    """Both amounts for a token; those of a call where a token costs nothing."""
    if before.per_token or after.per_token:
        return f"{size(before.per_token)} -> {size(after.per_token)}"
    return f"{size(before.fixed)} -> {size(after.fixed)} a call"


def full_change(before: Bytes, after: Bytes) -> str:
    """The same, and what each call costs beside its tokens where that changes."""
    text = change(before, after)
    if before.fixed != after.fixed and not text.endswith("a call"):
        text += f", {size(before.fixed)} -> {size(after.fixed)} a call"
    return text


def percent(before: Bytes, after: Bytes) -> str:
    """The change in parts of a hundred: -87 %."""
    a, b = (before.per_token, after.per_token) if before.per_token else (before.fixed, after.fixed)
    change = round(100 * (b - a) / a) if a else 0
    return f"{change:+d} %" if change else "0 %"
