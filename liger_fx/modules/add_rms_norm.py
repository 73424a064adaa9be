"""LigerAddRMSNorm: the module in place of an RMSNorm and of the sum that it is the norm of.

residual + attended;  (norm): LlamaRMSNorm((4096,), eps=1e-05)
->  (norm): LigerAddRMSNorm((4096,), eps=1e-05)
"""

from __future__ import annotations

import torch

from liger_fx.kernels.add_rms_norm import add_rms_norm
from liger_fx.modules.rms_norm import LigerRMSNorm


class LigerAddRMSNorm(LigerRMSNorm):
    """(norm(a + b), a + b) in one pass; of one tensor, the plain norm that LigerRMSNorm is.

    The model's own code calls it with one tensor, where a call is run by it and by no graph.
    """

    is_called_alike = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual: (..., width), of one shape and dtype. weight: (width,), used in
        place of the registered one. Returns the norm of their sum, (..., width) in the dtype that
        `cast` says, and the sum; without `residual` the norm of `hidden_states` alone.
        """
        if residual is None:
            return super().forward(hidden_states, weight)
        return add_rms_norm(hidden_states, residual, *self._given(hidden_states, weight))
