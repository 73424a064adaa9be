"""The model as it was before named modules came in: its modules, and what its code reads of them.

model.layers.0.self_attn   LlamaAttention(...)   ->   its class and what forward reads of it
model.norm                 LigerRMSNorm(...)     ->   LlamaRMSNorm, and the eps it had
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from liger_fx.codec import inside, shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.modules.origin import Origin, origins, plain_attributes
from liger_fx.storage.facts import Describer, Indescribable
from liger_fx.storage.model_code import ModelCode, full_name
from liger_fx.storage.named_modules import is_named
from liger_fx.storage.records import Module
from liger_fx.tracing.tree_state import class_of

# Set while a model is used, or where it was read from: no part of what it computes.
_PASSING = {
    "gradient_checkpointing", "_gradient_checkpointing_func", "name_or_path", "_is_hf_initialized",
}  # fmt: skip


class Original:
    """The model as it was before named modules came in, and what its code can read."""

    def __init__(self, root: nn.Module) -> None:
        self.parts = _parts(root)
        self.code = ModelCode(part.cls for part in self.parts)
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
            if name in _PASSING or not self.code.reads(name):
                continue
            try:
                texts[name] = self._describer.text(value)
            except Indescribable as kind:
                if is_followed:
                    raise _no_text(part, name, kind) from None
                texts[name] = f"a {kind}"
        return texts


def compare_modules(saved: list[Module], original: Original) -> None:
    """LoadError, naming the module, unless the model has those that were saved."""
    ours = {part.path: part.cls for part in original.parts}
    for i, (path, name, _) in enumerate(saved):
        with inside(f"modules[{i}]"):
            if path not in ours:
                raise LoadError(f"the model has no module {shown(path)}, a {_last(name)}")
            name_now = full_name(ours[path])
            if name_now != name:
                raise LoadError(
                    f"the module {shown(path)} is not the {_plain(name)} that was saved but a "
                    f"{_plain(name_now)}"
                )
    unknown = sorted(ours.keys() - {path for path, *_ in saved})
    if unknown:
        raise LoadError(f"the graph knows no module {shown(unknown[0])}", "modules")
    texts_now = {path: texts for path, _, texts in original.describe()}
    for i, (path, name, texts) in enumerate(saved):
        with inside(f"modules[{i}]"):
            _compare_texts(
                f"{shown(path)} is not the {_last(name)}", texts, texts_now[path], ours[path]
            )


def _compare_texts(what: str, texts: dict[str, str], now: dict[str, str], cls: type) -> None:
    hiding = {key for key in now if hasattr(cls, key)}  # a method or default of the class
    for key in sorted(texts.keys() | hiding):
        if texts.get(key) != now.get(key):
            here, there = (_plain(t[key]) if key in t else "absent" for t in (now, texts))
            raise LoadError(
                f"the module {what} that was saved: its attribute {_plain(key)} is {here} in the "
                f"model, {there} here"
            )


def _plain(name: str) -> str:
    return shown(name)[1:-1]


def _last(name: str) -> str:
    return _plain(name.rpartition(".")[2])


def _parts(root: nn.Module) -> list[Origin]:
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


def _no_text(part: Origin, name: str, kind: Indescribable) -> SaveError:
    where = part.path or "the model"
    return SaveError(
        f"The attribute {name} of {where} ({part.cls.__name__}) is a {kind}: nothing tells whether "
        "it is the same when the graph is loaded. Make it a number, a function or a dataclass."
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    held = plain_attributes(vars(module))
    if hasattr(module, "block_class"):
        # Its graphs were traced from the class's forward: one set on the object is a wrapper's.
        held = {n: v for n, v in held.items() if n not in ("_block", "forward")}
    return held
