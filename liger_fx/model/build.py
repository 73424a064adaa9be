"""From a plain model to blocks around the same weights.

LlamaForCausalLM(LlamaModel(LlamaDecoderLayer ...))   ->   the same tree, each a Block
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from liger_fx.model.alike import Alike
from liger_fx.model.block import Block, BlockState, bare_block
from liger_fx.model.planner import Planner
from liger_fx.model.tree import bare_module, copy_tree
from liger_fx.tracing.walk import module_at, modules_by_path


def build(model: nn.Module, paths: Iterable[str], planner: Planner) -> Block:
    """A second tree around the weights of ``model``, in which the modules at ``paths`` are blocks
    that ``planner`` makes plans for."""
    chosen = {module_at(model, path): path for path in paths}

    def bare(module: nn.Module) -> nn.Module:
        made: nn.Module = bare_block(type(module)) if module in chosen else bare_module(module)
        return made

    root: Block = copy_tree(model, bare)
    blocks = {path: module_at(root, path) for path in chosen.values()}
    for path, block in blocks.items():
        block.__dict__["_block"] = BlockState(path, planner, Alike(path, ()))
    planner.group(blocks)
    return root


def turn_into_blocks(
    tree: nn.Module, groups: Iterable[tuple[list[str], Alike]], planner: Planner
) -> Block:
    """The tree itself, the modules at the paths of each group turned into blocks that share its
    plans."""
    modules = modules_by_path(tree)
    made: dict[int, Block] = {}
    for paths, alike in groups:
        for path in paths:
            block = bare_block(type(modules[path]))
            block.__dict__.update(modules[path].__dict__)
            block.__dict__["_block"] = BlockState(path, planner, alike)
            alike.add(block)
            made[id(modules[path])] = block
    for module in (*modules.values(), *made.values()):
        for name, child in module._modules.items():
            if id(child) in made:
                module._modules[name] = made[id(child)]
    return made[id(tree)]
