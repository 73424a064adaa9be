"""A drawing in lines of text.

x                            bfloat16[batch, sequence, 64]
to = to(x, float32)          float32[batch, sequence, 64]
pow = pow(to, 2)             float32[batch, sequence, 64]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from liger_fx.engine.drawing import Box


def listing(boxes: Sequence[Box]) -> list[tuple[str, str]]:
    """(what is computed from what, dtype and shape) for each box; a result ends in ``*``."""
    names = box_names(boxes)
    rows = []
    for box, name in zip(boxes, names, strict=True):
        text = name
        if box.kind not in ("input", "parameter"):
            text = f"{name} = {_call(box, [names[place] for place in box.reads])}"
        rows.append((text + (" *" if box.result else ""), spec_text(box)))
    return rows


def _call(box: Box, read: list[str]) -> str:
    if box.kind == "module":
        settings = "" if box.detail.isidentifier() else f"; {box.detail}"
        return f"{box.label}({', '.join(read)}{settings if box.detail else ''})"
    return f"{box.label}({', '.join([*read, *([box.detail] if box.detail else [])])})"


def box_names(boxes: Sequence[Box]) -> list[str]:
    """A name for each box, by which others can say that they read it: mul, mul_2."""
    seen: Counter[str] = Counter()
    names = []
    for box in boxes:
        name = box.label
        if box.kind == "module" and box.detail.isidentifier():
            name = box.detail  # gate_proj says more than Linear
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def spec_text(box: Box) -> str:
    """bfloat16[batch, sequence, 64]; empty for what is no tensor."""
    if box.dtype is None or box.shape is None:
        return ""
    return f"{box.dtype}[{', '.join(map(str, box.shape))}]"
