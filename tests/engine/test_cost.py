"""What a site is said to move and to keep is what PyTorch really moves and keeps for one token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

import liger_fx
from liger_fx.engine.drawing import Cost
from liger_fx.tiny import tiny_model

_NO_DATA_MOVED = {"view", "t", "transpose", "unsqueeze", "slice", "expand", "_unsafe_view", "alias",
                  "detach", "permute", "split", "select", "squeeze", "stack_view"}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes of every tensor that an operator is given and gives; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _NO_DATA_MOVED:
            tensors = {id(t): t for t in nn.utils.parameters_to_vector.__globals__["_"](args)} \
                if False else _tensors((args, result))
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return list({id(t): t for t in leaves if isinstance(t, torch.Tensor)}.values())
