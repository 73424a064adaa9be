"""The cells of a table broken into lines so that the table fits a page.

model.layers.0-1.input_layernorm, model.layers.0-1.mlp   ->   model.layers.0-1
                                                                .input_layernorm,
                                                                .mlp
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from liger_fx.report.folding import fold

_BETWEEN, _PADDING = 2, 2  # the blanks that tabulate leaves between columns, and beside a header
_WHOLE = 28  # what stands between two commas is not broken up to this length
_BLANK = "\0"  # stands for a blank at which no line may end


def fitted(headers: Sequence[str], rows: list[list[str]], width: int) -> list[list[str]]:
    """The rows with line breaks: a table of at most ``width`` columns, if its longest words allow.

    A column headed "where" lists module paths, one a line. Names of a tree, which begin with
    blanks, are not broken.
    """
    breakers = [paths if header == "where" else wrapped for header in headers]
    columns = list(zip(*rows, strict=True))
    widths, least = (
        [
            max(len(header) + _PADDING, *(_longest_line(broken(text, limit)) for text in column))
            for header, broken, column in zip(headers, breakers, columns, strict=True)
        ]
        for limit in (width, 1)
    )
    while sum(widths) + _BETWEEN * (len(widths) - 1) > width:
        broad = [w if w > m else 0 for w, m in zip(widths, least, strict=True)]
        if not any(broad):
            break
        widths[broad.index(max(broad))] -= 1
    return [
        [broken(text, w) for broken, text, w in zip(breakers, row, widths, strict=True)]
        for row in rows
    ]


def paths(text: str, width: int) -> str:
    """Module paths one a line; those below one module, and those too long, below its path."""
    groups = fold(text.split(", "), key=lambda path: path.rpartition(".")[0])
    room = [width] * (len(groups) - 1) + [width + 1]  # a comma stands behind all but the last
    return ",\n".join(_below(*each) for each in zip(groups, room, strict=True))


def _below(group: list[str], room: int) -> str:
    above = group[0].rpartition(".")[0]
    if not above or (len(group) == 1 and len(group[0]) < room):
        return ",\n".join(group)
    names = (path.removeprefix(above) for path in group)
    return f"{above}\n" + ",\n".join(f"  {name}" for name in names)


def wrapped(text: str, width: int) -> str:
    """Lines of at most ``width`` or of one word, broken after commas where that is enough."""
    if len(text) <= width or text.startswith(" "):
        return text
    parts = text.split(", ")
    whole = ", ".join(p.replace(" ", _BLANK) if len(p) <= _WHOLE else p for p in parts)
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(_BLANK, " ")


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))
