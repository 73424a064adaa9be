"""From an optimised model back to one of transformers' own, around the same trained weights.

LlamaForCausalLM (blocks)                      LlamaForCausalLM (plain)
  layers.0.mlp: LigerSwiGLUMLP           ->      layers.0.mlp: LlamaMLP
  layers.0.self_attn.rotary: LigerRotary...      (gone: it was mounted beside)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from liger_fx.errors import UsageError
from liger_fx.model.block import Block
from liger_fx.model.tree import copy_tree, plain_module
from liger_fx.modules.origin import NamedModule, origins, turn_back

_OWN = ("_block", "_origins")


def restore(opt: nn.Module) -> Any:
    """The original model of ``opt``: plain classes, and what stood where named modules are, with
    the very parameters and buffers of ``opt``.

    Hooks, modes and configs are taken over as they are now; ``opt`` stays as it is. UsageError for
    what neither ``optimize`` nor ``load`` made.
    """
    if not isinstance(opt, Block):
        raise UsageError(f"A {type(opt).__name__} is no result of liger_fx.optimize or load.")
    root: nn.Module = copy_tree(opt, plain_module)
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, NamedModule):
            if origins(module):
                turn_back(module)
            else:  # it was mounted beside
                owner, _, name = path.rpartition(".")
                del root.get_submodule(owner)._modules[name]
    for module in root.modules():
        for name in _OWN:
            module.__dict__.pop(name, None)
    return root
