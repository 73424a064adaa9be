"""Whether code that is under way would go on after an error of a call that it makes.

    try: h = torch.linalg.cholesky(x)           refused: at another call it may fail, and no graph
    except RuntimeError: h = fallback(x)        would go on here
    try: h = self.table(ids)
    except IndexError as e: raise ... from e    nothing: it ends with an error either way

Found in the compiled code of the frames; nothing runs.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType, FrameType
from typing import Any, NamedTuple

from liger_fx.tracing.reach import of_a_library


class _Region(NamedTuple):
    start: int
    end: int
    handler: int


def catches_errors(frame: FrameType | None, outermost: FrameType | None) -> bool:
    """Whether this frame or one around it, below the outermost one, goes on after an error of the
    call that it is making. (What libraries catch is no model's code.)"""
    while frame is not None and frame is not outermost:
        code = frame.f_code
        if (
            _regions(code)
            and not of_a_library(frame.f_globals.get("__name__", ""))
            and _goes_on(code, frame.f_lasti)
        ):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(16384)
def _regions(code: CodeType) -> tuple[_Region, ...]:
    if not code.co_exceptiontable:
        return ()
    # typeshed does not know of them.
    entries: Any = vars(dis.Bytecode(code))["exception_entries"]
    return tuple(_Region(entry.start, entry.end, entry.target) for entry in entries)


def _goes_on(code: CodeType, offset: int) -> bool:
    """Whether an error at this offset ends in a handler that does not raise one itself."""
    seen: set[int] = set()
    while True:
        found = (r.handler for r in _regions(code) if r.start <= offset < r.end)
        handler = next(found, None)
        if handler is None or handler in seen:
            return False
        if _swallows(code, handler):
            return True
        seen.add(handler)
        offset = handler  # what it raises again goes to the handler around it


@functools.lru_cache(4096)
def _swallows(code: CodeType, handler: int) -> bool:
    """Whether a handler can be left without an error: it gives the error up, and raises none. That
    of a ``with`` could, but those of no_grad and autocast do not, and suppress is refused."""
    steps = [s for s in dis.get_instructions(code) if s.offset >= handler and s.opname != "CACHE"]
    if any(step.opname == "WITH_EXCEPT_START" for step in steps[:2]):
        return False
    for step, after in zip(steps, steps[1:], strict=False):
        if step.opname == "POP_EXCEPT":
            return after.opname != "RERAISE"
    return False
