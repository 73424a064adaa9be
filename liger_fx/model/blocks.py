"""Which modules of a model are blocks: units that are traced, rewritten and called by themselves.

LlamaForCausalLM            the root
  model: LlamaModel         a PreTrainedModel
    layers: 0, 1, ...       GradientCheckpointingLayers
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from liger_fx.errors import UsageError
from liger_fx.tracing.leaf_modules import is_leaf
from liger_fx.tracing.walk import modules_by_path

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList)


def find_blocks(model: nn.Module, chosen: Iterable[str] | None = None) -> list[str]:
    """The paths of the blocks of ``model``, the root ("") first.

    chosen: paths or globs of what shall be one, besides the root, instead of: every
        PreTrainedModel and every layer made to be checkpointed, and, in a model that is none of
        transformers', the entries of a ModuleList that are all alike, or alike to another. A
        lonely one counts: what repeats in one place may stand alone in another. UsageError for one
        that names no module.
    """
    modules = modules_by_path(model)
    if chosen is not None:
        return ["", *_chosen(list(chosen), modules)]
    found = [
        path
        for path, module in modules.items()
        if path and isinstance(module, (PreTrainedModel, GradientCheckpointingLayer))
    ]
    if not isinstance(model, PreTrainedModel):
        found += [path for path in _alike_entries(modules) if path not in found]
    order = {path: i for i, path in enumerate(modules)}
    return ["", *sorted(found, key=order.__getitem__)]


def _chosen(entries: list[str], modules: dict[str, nn.Module]) -> list[str]:
    for entry in entries:
        if not any(fnmatchcase(path, entry) for path in modules):
            raise UsageError(f"blocks: {entry!r} names no module of the model.")
    return [
        path
        for path, module in modules.items()
        if path
        and not isinstance(module, _CONTAINERS)
        and not is_leaf(module)
        and any(fnmatchcase(path, entry) for entry in entries)
    ]


def _alike_entries(modules: dict[str, nn.Module]) -> list[str]:
    found = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList):
            counts = Counter(type(entry) for entry in module)
            for i, entry in enumerate(module):
                if (counts[type(entry)] > 1 or len(module) == 1) and not is_leaf(entry):
                    found.append(f"{path}.{i}" if path else str(i))
    # One that hangs elsewhere as well is there under its first path.
    return [p for p in found if p in modules and not isinstance(modules[p], _CONTAINERS)]
