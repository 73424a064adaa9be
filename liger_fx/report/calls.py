"""The kinds of calls of a block in short words: what all of them have, then each one's own.

"ids int64[batch, sequence] on cpu, mask bool[batch, sequence] on cpu",
"ids int64[batch, sequence] on cpu, use_cache True"
 ->
"ids: with mask; with use_cache=True"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

# How a call is described: a tensor, an object, a number of any value, a tuple, a mapping; what is
# none of these is a plain value.
_NAME_SAYS_ENOUGH = re.compile(r"\w+\[.*\] on \S+|an? [\w.]+|any \w+|the size \w+|\(.*\)|\{.*\}")


def short_calls(calls: Sequence[str]) -> str:
    """All kinds of calls; "(2 x)" where two differ in dtypes, sizes or modes alone."""
    if not calls:
        return "none yet"
    kinds = [tuple(map(_word, arguments(call))) for call in calls]
    shared = [word for word in kinds[0] if all(word in kind for kind in kinds)]
    own = Counter(", ".join(word for word in kind if word not in shared) for kind in kinds)
    if len(own) == 1:
        return _times(", ".join(shared) or "no argument", len(kinds))
    told = (_times(f"with {text}" if text else "alone", count) for text, count in own.items())
    return f"{', '.join(shared)}{': ' if shared else ''}{'; '.join(told)}"


def arguments(call: str) -> Iterator[str]:
    """Each argument of a described call, name and description."""
    part = ""
    for piece in call.split(", "):
        part = f"{part}, {piece}" if part else piece
        if _count(part, "([{") <= _count(part, ")]}"):
            yield part
            part = ""
    if part:
        yield part


def _count(text: str, letters: Iterable[str]) -> int:
    return sum(map(text.count, letters))


def _word(argument: str) -> str:
    """The name of a tensor or an object; the name and value of what holds for one value."""
    name, _, description = argument.partition(" ")
    if not description or _NAME_SAYS_ENOUGH.fullmatch(description):
        return name
    return f"{name}={description}"


def _times(text: str, count: int) -> str:
    return text if count == 1 else f"{text} ({count} x)"
