"""LigerRMSNorm: the module in place of every spelling of RMSNorm.

(norm): LlamaRMSNorm((4096,), eps=1e-05)
->  (norm): LigerRMSNorm((4096,), eps=1e-05)

(norm): GemmaRMSNorm((2048,), eps=1e-06)
->  (norm): LigerRMSNorm((2048,), eps=1e-06, scale=1 + weight)
"""

from typing import Any

import torch
from torch import nn

from liger_fx.kernels.launch import compute_dtype
from liger_fx.kernels.rms_norm import rms_norm
from liger_fx.modules.casting import Cast, check_cast, result_dtype
from liger_fx.modules.constant import constant
from liger_fx.modules.origin import NamedModule

Given = tuple[torch.Tensor | None, float, float, torch.dtype]


class LigerRMSNorm(NamedModule):
    """y = x * rsqrt(mean(x^2, -1) + eps) * (offset + weight), in float32 and rounded once.

    width: the size of the last dimension.
    eps: None for the machine epsilon of the dtype that the norm is computed in (float32, or float64
        for float64 input), as torch.nn.RMSNorm has it.
    weight: the original parameter of shape (width,), registered under `weight_name`, never a copy;
        None where there is none or it comes with the call.
    offset: 1.0 where the model multiplies by 1 + weight.
    cast: the result's dtype, as `result_dtype` has it. It is rounded to that dtype once.
    """

    eps = constant("_eps")
    offset = constant("_offset")
    _eps: str | None
    _offset: str

    def __init__(
        self,
        width: int,
        eps: float | None,
        *,
        weight: nn.Parameter | None = None,
        weight_name: str = "weight",
        offset: float = 0.0,
        cast: Cast = "input",
    ) -> None:
        super().__init__()
        check_cast(cast)
        self.width = width
        self.eps = eps
        self.offset = offset
        self.cast: Cast = cast
        self.weight_name = weight_name
        self.register_parameter(weight_name, weight)

    def forward(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_states: (..., width). weight: (width,), used in place of the registered one.
        Returns (..., width) in the dtype that `cast` says.
        """
        return rms_norm(hidden_states, *self._given(hidden_states, weight))

    def _given(self, x: torch.Tensor, weight: torch.Tensor | None) -> Given:
        """What a norm of x takes besides: weight, eps, offset and the result's dtype."""
        if weight is None:
            weight = self._tensor(self.weight_name)
        # The texts behind the properties, whose calls take longer than their numbers.
        eps = torch.finfo(compute_dtype(x)).eps if self._eps is None else float(self._eps)
        dtype = x.dtype if self.cast == "input" else result_dtype(self.cast, x, weight)
        return weight, eps, float(self._offset), dtype

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again, its weight aside."""
        names = ("width", "eps", "weight_name", "offset", "cast")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        parts = [f"({self.width},)", f"eps={self.eps}"]
        if self.offset:
            parts.append(f"scale={self.offset:g} + weight")
        if self.cast != "input":
            parts.append(f"cast={self.cast}")
        return ", ".join(parts)
