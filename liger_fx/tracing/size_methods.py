"""What Python's numbers can and PyTorch's symbolic ones cannot.

divmod(size, 3)                     computed by nodes, as // and % are
{size: 1}, size.bit_length()        what the number says, and the graph is for that number alone
f"{size}"                           the same; but not in the message of a check, where it is "?"
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from liger_fx.tracing.recorder import Recorder, recorder_of_thread
from liger_fx.tracing.torch_calls import is_model_code

_KINDS: dict[Any, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


class SizeText(NamedTuple):
    """The text of a size, of which nobody knows yet what becomes of it: the place in the code that
    asked for it, and what it says."""

    settle: Callable[[], Any]
    code: CodeType
    line: int
    text: str


def patch_sizes(replace: Callable[[Any, str, Any], None]) -> None:
    """Let symbolic numbers answer a model's code as numbers do; PyTorch's own code is answered as
    ever."""
    replace(torch.SymInt, "__divmod__", lambda self, other: (self // other, self % other))
    replace(torch.SymInt, "__rdivmod__", lambda self, other: (other // self, other % self))
    for symbolic, plain in _KINDS.items():
        for name in ("__str__", "__repr__", "__format__"):
            replace(symbolic, name, _text(name, getattr(symbolic, name), plain))
        replace(symbolic, "__hash__", _hash(symbolic.__hash__, plain))
        replace(symbolic, "__getattr__", _attribute(plain))


def _text(name: str, original: Any, plain: type) -> Callable[..., str]:
    def text(self: Any, *args: str) -> str:
        recorder, frame = recorder_of_thread(), sys._getframe(1)
        if recorder is None or not is_model_code(frame.f_code):
            return str(original(self, *args))
        example = self.node.hint
        said = "?" if example is None else str(getattr(plain(example), name)(*args))
        made = SizeText(lambda: plain(self), frame.f_code, frame.f_lineno, said)
        recorder.texts.append(made)
        return said

    return text


def _hash(original: Any, plain: type) -> Callable[[Any], int]:
    def hashed(self: Any) -> int:
        return hash(plain(self)) if _is_asked() else int(original(self))

    return hashed


def _attribute(plain: type) -> Callable[[Any, str], Any]:
    """For what is no attribute of the symbolic class."""

    def look_up(self: Any, name: str) -> Any:
        if hasattr(plain, name) and _is_asked():
            return getattr(plain(self), name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    return look_up


def _is_asked() -> bool:
    """Whether it is a model's code that asks, and a trace is listening."""
    return recorder_of_thread() is not None and is_model_code(sys._getframe(2).f_code)


def message_of(recorder: Recorder, message: Any) -> str:
    """What a check that the model's code makes at the moment says where it fails: with "?" for each
    size."""
    texts = recorder.texts
    before = len(texts)
    said = str(message() if callable(message) else message)
    mine = [text for text in texts[:before] if _is_around(sys._getframe(1), text)] + texts[before:]
    for text in mine:
        texts.remove(text)
        said = re.sub(rf"(?<![\d.]){re.escape(text.text)}(?![\d.]\d)", "?", said)
    return said


def _is_around(frame: FrameType | None, text: SizeText) -> bool:
    """Whether a call that is under way was written around the place that asked for the text."""
    while frame is not None:
        if frame.f_code is text.code:
            first, last, *_ = list(text.code.co_positions())[frame.f_lasti // 2]
            return first is not None and last is not None and first <= text.line <= last
        frame = frame.f_back
    return False
