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
from liger_fx.modules.origin import NamedModule, origins

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
            owner, _, name = path.rpartition(".")
            _put_back(root.get_submodule(owner), name, module)
    for module in root.modules():
        for name in _OWN:
            module.__dict__.pop(name, None)
    return root


def _put_back(owner: nn.Module, name: str, named: nn.Module) -> None:
    """What the named module at this place replaced, or nothing where it was mounted beside."""
    stood = origins(named)
    if not stood:
        del owner._modules[name]
        return
    root = stood[0].module()
    root.training = named.training
    root._parameters.update({k: p for k, p in named._parameters.items() if p is not None})
    root._buffers.update(named._buffers)
    root._modules.update(named._modules)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        getattr(root, hooks).update(getattr(named, hooks))
    for origin in stood[1:]:
        place, _, own = origin.path.rpartition(".")
        root.get_submodule(place).add_module(own, origin.module())
    owner._modules[name] = root
