"""PEFT's linear layers with a LoRA adapter.

    q_proj = self.q_proj(x)                 (q_proj): lora.Linear
 ->
    q_proj = self.q_proj(x)                 (q_proj): LigerLoraLinear, around the same modules

The layer keeps its place and its adapters, and is PEFT's still (liger_fx/modules/lora_linear.py).
"""

from __future__ import annotations

from typing import Any

from liger_fx.engine.match import Match
from liger_fx.engine.pattern import Constant, Op, Tensor, anything
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule

_PEFT = "peft.tuners.lora.layer"


class AdaptedLinear(Rule):
    """In the place of the layer. (By its file's name it comes before the rules for MLPs, which put
    the layers into modules of their own.)"""

    name = "adapted_linear"
    pattern = Op("linear", (Tensor("x"),), {"module": Constant("layer"), "is_adapted": True})
    looks_like = Op("linear", (anything,), {"is_adapted": True})

    def check(self, match: Match) -> None:
        """PEFT's own LoRA layer around a plain linear layer."""
        layer: Any = match.view.module(match["layer"])
        kind = type(layer)
        if kind.__module__ != _PEFT or kind.__name__ != "Linear":
            raise Reject(f"{kind.__module__}.{kind.__name__} is no plain LoRA layer", match.root)
        base = type(layer.base_layer)
        if base.__module__ != "torch.nn.modules.linear":
            raise Reject(f"the layer inside is a {base.__name__}", match.root)
        plain = [name for name in layer.lora_A if name not in layer.lora_variant]
        if not plain:
            kinds = sorted({type(v).__name__ for v in layer.lora_variant.values()}) or ["none"]
            raise Reject(f"its adapters are of another kind: {', '.join(kinds)}", match.root)

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is None:
            return None
        from liger_fx.modules.lora_linear import LigerLoraLinear

        module = LigerLoraLinear.around(owner.module)
        return Replacement(module, (match["x"],), self.name)
