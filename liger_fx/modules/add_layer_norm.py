"""LigerAddLayerNorm: the module in place of a LayerNorm and of the sum that it is the norm of.

residual + attended;  (ln_2): LayerNorm((768,), eps=1e-05, elementwise_affine=True)
->  (ln_2): LigerAddLayerNorm((768,), eps=1e-05, weight, bias, cast=autocast)
"""

from __future__ import annotations

import torch

from liger_fx.kernels.add_layer_norm import add_layer_norm
from liger_fx.modules.layer_norm import LigerLayerNorm


class LigerAddLayerNorm(LigerLayerNorm):
    """(norm(a + b), a + b) in one pass; of one tensor, the plain norm that LigerLayerNorm is.

    The model's own code calls it with one tensor, where a call is run by it and by no graph.
    """

    is_called_alike = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual: (..., width), of one shape and dtype. weight, bias: (width,),
        used in place of the registered ones. Returns the norm of their sum, (..., width) in the
        dtype that `cast` says, and the sum; without `residual` the norm of `hidden_states` alone.
        """
        if residual is None:
            return super().forward(hidden_states, weight, bias)
        given = self._given(hidden_states, weight, bias)
        return add_layer_norm(hidden_states, residual, *given)
