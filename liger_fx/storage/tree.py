"""What a saved graph keeps of a module tree, to know the tree again: modules and tensors.

model.layers.0.self_attn   LlamaAttention(...)   ->   its class and what forward reads of it
model.embed_tokens.weight, lm_head.weight, one tensor        ->   one record, and "same_as"
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from liger_fx.errors import SaveError
from liger_fx.graph_model import GraphModel
from liger_fx.modules.origin import Origin, origins, plain_attributes
from liger_fx.storage.facts import Describer, Indescribable
from liger_fx.storage.named_modules import is_named
from liger_fx.storage.reach import Reach
from liger_fx.storage.records import Module, TensorKind

# Set while a model is used, or where it was read from: no part of what it computes.
_PASSING = {
    "gradient_checkpointing", "_gradient_checkpointing_func", "name_or_path", "_is_hf_initialized",
}  # fmt: skip
# What torch.fx keeps on an optimised model's root.
_GRAPH_MODULE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))

PARAMETER: Final = "parameter"
BUFFER: Final = "buffer"
CONSTANT: Final = "constant"
ATTRIBUTE: Final = "attribute"
# In a checkpoint are parameters and persistent buffers, the rest belongs to the model's code.
IN_CHECKPOINT = (PARAMETER, BUFFER)


@dataclass(frozen=True)
class Slot:
    """A place of the tree where a tensor is: ``group[name]``, where ``path`` leads."""

    path: str
    kind: TensorKind
    group: dict[str, Any]
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        found: torch.Tensor = self.group[self.name]
        return found


def slots(root: nn.Module) -> Iterator[Slot]:
    """Every place of a tensor, tied ones each: parameters, buffers, tensors that are attributes."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        passing = module._non_persistent_buffers_set
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield Slot(prefix + name, PARAMETER, module._parameters, name)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind: TensorKind = CONSTANT if name in passing else BUFFER
                yield Slot(prefix + name, kind, module._buffers, name)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield Slot(prefix + name, ATTRIBUTE, vars(module), name)


def parts(root: nn.Module) -> list[Origin]:
    """The modules of the model as it was before named modules came in, at each of their paths."""
    found: list[Origin] = []
    for path, module in root.named_modules(remove_duplicate=False):
        if not is_named(module):
            found.append(Origin(path, class_of(module), _attributes(module)))
            continue
        for origin in origins(module):
            inner = f"{path}.{origin.path}" if origin.path else path
            found.append(Origin(inner, origin.cls, origin.attributes))
    return found


class Original:
    """The model as it was before named modules came in, and what its code can read."""

    def __init__(self, root: nn.Module) -> None:
        self.parts = parts(root)
        self.reach = Reach(self.parts)
        self._describer = Describer({id(module) for module in root.modules()})

    def describe(self, followed: Container[str] = ()) -> list[Module]:
        """[path, class, {attribute: its text}] of each module.

        The attributes are those that the code of the model's classes can read: an eps, a scale, an
        activation function. SaveError where one of a ``followed`` module has no text.
        """
        return [
            (part.path, full_name(part.cls), self._texts(part, part.path in followed))
            for part in self.parts
        ]

    def _texts(self, part: Origin, is_followed: bool) -> dict[str, str]:
        texts: dict[str, str] = {}
        for name, value in sorted(part.attributes.items()):
            if name in _PASSING or not self.reach.reads(name):
                continue
            try:
                texts[name] = self._describer.text(value)
            except Indescribable as kind:
                if is_followed:
                    raise _no_text(part, name, kind) from None
                texts[name] = f"a {kind}"
        return texts


def _no_text(part: Origin, name: str, kind: Indescribable) -> SaveError:
    where = part.path or "the model"
    return SaveError(
        f"The attribute {name} of {where} ({part.cls.__name__}) is a {kind}: nothing tells whether "
        "it is the same when the graph is loaded. Make it a number, a function or a dataclass."
    )


def full_name(cls: type) -> str:
    """A class with its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; of an optimised model, the class of the model it was made from."""
    return getattr(module, "model_class", type(module))


def _attributes(module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, GraphModel):
        return plain_attributes(vars(module))
    # A graph was traced from the class's forward: one set on the object since is a wrapper's.
    held = plain_attributes(module._attributes())
    return {n: v for n, v in held.items() if n not in _GRAPH_MODULE and n != "forward"}
