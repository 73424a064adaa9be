"""What a model's code checks of its data through PyTorch's functions for that stays checked.

torch._check_tensor_all(x > 0)              ->  check(gt, "builtins:RuntimeError", None)
torch._check(count.item() == 5, "count")    ->  check(eq, "builtins:RuntimeError", "count")

A check of sizes alone is a comparison like any other, which the call must confirm.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from liger_fx.tracing import leaves
from liger_fx.tracing.functions import importable
from liger_fx.tracing.recorder import Recorder
from liger_fx.tracing.size_methods import message_of

# In a message a number that only the data tell.
_FAKE = re.compile(r"FakeTensor\(.*?dtype=[\w.]+\)")


def record_check(recorder: Recorder, error: Any, condition: Any, message: Any) -> None:
    """A node that raises ``error`` where the condition does not hold; where only sizes are asked,
    the question itself, now."""
    if isinstance(condition, torch.SymBool) and not _is_of_data(condition):
        said = None if message is None else message_of(recorder, message)
        if not condition:
            raise error(said)
        return
    try:
        text = None if message is None else _FAKE.sub("?", message_of(recorder, message))
        with recorder.paused():
            node = recorder.argument(condition)
            recorder.create_node("call_function", leaves.check, (node, importable(error), text))
    except BaseException as failure:
        recorder.owner.failed(failure)
        raise


def _is_of_data(condition: torch.SymBool) -> bool:
    return condition.node.hint is None
