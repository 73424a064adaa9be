"""LigerExperts: the experts of a mixture, around the model's own weights.

(experts): MixtralExperts(                   (experts): LigerExperts(
  (act_fn): SiLUActivation()           ->      8 x (4096 -> 14336), activation=silu
)                                            )
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_fx.kernels.activation import check_activation
from liger_fx.kernels.experts import experts, experts_sizes
from liger_fx.modules.origin import NamedModule, as_original, origins


class LigerExperts(NamedModule):
    """The sum over a token's experts of weight * down(activation(gate(x)) * up(x)).

    gate_up_proj, down_proj: the original parameters, never copies; `transposed` says how they lie:
    see liger_fx.kernels.experts. activation: one of liger_fx.kernels.activation.ACTIVATIONS.
    ValueError for an unknown activation and parameters that do not fit each other.

    It stands for transformers' "grouped_mm". Where the config asks for another implementation
    later, a call computes by that, as the original module would. (torch.compile raises an error
    then: optimise again.)
    """

    def __init__(
        self,
        gate_up_proj: nn.Parameter,
        down_proj: nn.Parameter,
        *,
        activation: str,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.sizes = experts_sizes(gate_up_proj, down_proj, transposed)
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.activation, self.transposed = activation, transposed

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: (tokens, hidden); top_k_index, the experts of each token, and
        top_k_weights: (tokens, k). Returns (tokens, hidden), in the dtype of hidden_states.
        """
        if not self._is_grouped():
            original: Any = as_original(self)
            result: torch.Tensor = original.forward(hidden_states, top_k_index, top_k_weights)
            return result
        return experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj,
            self.activation, self.transposed,
        )  # fmt: skip

    def _is_grouped(self) -> bool:
        config = origins(self)[0].attributes.get("config") if origins(self) else None
        return getattr(config, "_experts_implementation", "grouped_mm") == "grouped_mm"

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again, around its parameters."""
        return {"activation": self.activation, "transposed": self.transposed}

    def extra_repr(self) -> str:
        number, hidden, width = self.sizes
        layout = ", transposed" if self.transposed else ""
        return f"{number} x ({hidden} -> {width}), activation={self.activation}{layout}"
