"""LigerLoraLinear: PEFT's linear layer with a LoRA adapter, computed with the sums inside the
products.

(q_proj): lora.Linear(                        (q_proj): LigerLoraLinear(
  (base_layer): Linear(...)                     (base_layer): Linear(...)
  (lora_A): ModuleDict(...)             ->      (lora_A): ModuleDict(...)
  ...                                           ...
)                                             )

It is PEFT's layer still: its adapters are switched, merged, saved and added as ever. (This file
needs PEFT: nothing imports it before a model has such a layer.)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from liger_fx.kernels.lora_linear import lora_linear
from liger_fx.modules.calling import only_runs_forward


class LigerLoraLinear(Linear):
    """As PEFT's lora.Linear, in fewer passes where one plain adapter is active around a frozen
    layer; PEFT's own code computes the rest (several adapters, DoRA, merged or disabled ones,
    autocast)."""

    @classmethod
    def around(cls, layer: Linear) -> LigerLoraLinear:
        """The same layer, its modules, parameters and attributes shared."""
        made = cls.__new__(cls)
        made.__dict__.update({name: copy.copy(held) for name, held in vars(layer).items()})
        return made

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        adapter = None if args or kwargs else self._adapter(x)
        if adapter is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.base_layer
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dropout, dropped = self.lora_dropout[adapter], None
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            # In A's dtype, as PEFT does: the mask that is drawn depends on it.
            dropped = dropout(x.to(a.dtype)).to(x.dtype)
        return lora_linear(x, dropped, base.weight, base.bias, a, b, self.scaling[adapter])

    def options(self) -> dict[str, Any]:
        """Nothing: such a layer is made again around PEFT's."""
        return {}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # under its own name, without PEFT's prefix

    def _adapter(self, x: torch.Tensor) -> str | None:
        """The name of the adapter, if there is nothing to compute but the layer and that one."""
        active = self.active_adapters
        if len(active) != 1 or self.disable_adapters or self.merged:
            return None
        name: str = active[0]
        if name not in self.lora_A or name in self.lora_variant:
            return None
        base, dropout = self.base_layer, self.lora_dropout[name]
        layers = (base, self.lora_A[name], self.lora_B[name])
        plain = all(type(m) is nn.Linear and only_runs_forward(m) for m in layers)
        if not plain or type(dropout) not in _DROPOUTS or not only_runs_forward(dropout):
            return None
        tensors = (x, *(p for m in layers for p in m.parameters(recurse=False)))
        if not _KINDS.issuperset(map(type, tensors)) or torch.is_autocast_enabled(x.device.type):
            return None
        is_frozen = not any(p.requires_grad for p in base.parameters(recurse=False))
        fits = x.dtype is base.weight.dtype and self.lora_B[name].bias is None
        return name if is_frozen and fits and self.cast_input_dtype_enabled else None


_KINDS = frozenset((torch.Tensor, nn.Parameter))
_DROPOUTS = (nn.Dropout, nn.Identity)
