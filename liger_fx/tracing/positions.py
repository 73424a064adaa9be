"""Positions that were counted: no mask need ask them whether sequences are packed.

    positions = torch.arange(ids.shape[1]).add(0).unsqueeze(0)
    build_mask("create_causal_mask", ..., attention_mask=None, position_ids=positions)
 ->
    build_mask("create_causal_mask", ..., attention_mask=None, position_ids=None)

Where there is neither a mask of padding nor a cache, transformers looks for positions that do not
go up by one: there another sequence begins. Of counted ones that is known to be nowhere. To look
makes each call wait for the GPU, and torch.compile, which cannot look, makes a mask in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from liger_fx.tracing.effects import is_effectful

# Builders of transformers.masking_utils that ask positions for nothing else.
_BUILDERS = {
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
}


def without_counted_positions(
    builder: str, keywords: dict[str, Any], root: nn.Module
) -> dict[str, Any]:
    """A mask builder's keywords as they are recorded, positions left out where they tell it
    nothing."""
    positions = keywords.get("position_ids")
    asks = keywords.get("attention_mask") is None and keywords.get("past_key_values") is None
    if builder in _BUILDERS and asks and isinstance(positions, fx.Node):
        counted = _counted(positions)
        if counted is not None and not any(is_effectful(user, root) for user in _after(counted)):
            return {**keywords, "position_ids": None}
    return keywords


def _counted(node: fx.Node) -> fx.Node | None:
    """The torch.arange of which the node's last dimension is made, by a step of one, so that it is
    first, first + 1, first + 2, ...; None where it is not."""
    spec = node.meta.get("spec")
    if spec is None or spec.dtype not in (torch.int32, torch.int64) or not node.args:
        return None
    if node.target is torch.arange:
        return node if len(node.args) < 3 and node.kwargs.get("step", 1) == 1 else None
    source, *others = node.args
    if node.op != "call_method" or not isinstance(source, fx.Node):
        return None
    keeps = {
        "unsqueeze": others in ([0], [-2]),
        "expand": others[-1:] == [-1],
        "add": not node.kwargs and not any(map(_is_tensor, others)),
        "to": not any(map(_is_tensor, others)),
    }
    return _counted(source) if keeps.get(str(node.target)) else None


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and "spec" in argument.meta


def _after(node: fx.Node) -> Iterator[fx.Node]:
    """Whatever was made of it so far, and so may write into it."""
    seen, waiting = {node}, [node]
    while waiting:
        new = [user for user in waiting.pop().users if user not in seen]
        yield from new
        seen.update(new)
        waiting += new
