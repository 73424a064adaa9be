"""LigerLayerNorm: the module in place of every spelling of LayerNorm.

(ln_1): LayerNorm((768,), eps=1e-05, elementwise_affine=True)
->  (ln_1): LigerLayerNorm((768,), eps=1e-05, weight, bias, cast=autocast)

(norm): NemotronLayerNorm1P((3072,), eps=1e-05)
->  (norm): LigerLayerNorm((3072,), eps=1e-05, 1 + weight, bias, cast=autocast)
"""

from typing import Any

import torch
from torch import nn

from liger_fx.kernels.layer_norm import layer_norm
from liger_fx.modules.casting import Cast, check_cast, result_dtype
from liger_fx.modules.constant import constant
from liger_fx.modules.origin import NamedModule

Given = tuple[torch.Tensor | None, torch.Tensor | None, float, float, torch.dtype]


class LigerLayerNorm(NamedModule):
    """y = (x - mean) * rsqrt(variance + eps) * (offset + weight) + bias, in float32, rounded once.

    width: the size of the last dimension.
    weight, bias: the original parameters of shape (width,), registered under `weight_name` and
        `bias_name`, never copies; None where there is none or it comes with the call.
    offset: 1.0 where the model multiplies by 1 + weight.
    cast: the result's dtype, as `result_dtype` has it. It is rounded to that dtype once.
    """

    eps = constant("_eps")
    offset = constant("_offset")

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        weight: nn.Parameter | None = None,
        weight_name: str = "weight",
        bias: nn.Parameter | None = None,
        bias_name: str = "bias",
        offset: float = 0.0,
        cast: Cast = "input",
    ) -> None:
        super().__init__()
        check_cast(cast)
        self.width = width
        self.eps = eps
        self.offset = offset
        self.cast: Cast = cast
        self.weight_name, self.bias_name = weight_name, bias_name
        self.register_parameter(weight_name, weight)
        self.register_parameter(bias_name, bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: (..., width). weight, bias: (width,), used in place of the registered
        ones. Returns (..., width) in the dtype that `cast` says.
        """
        return layer_norm(hidden_states, *self._given(hidden_states, weight, bias))

    def _given(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> Given:
        """What a norm of x takes besides: weight, bias, eps, offset and the result's dtype."""
        if weight is None:
            weight = self._tensor(self.weight_name)
        if bias is None:
            bias = self._tensor(self.bias_name)
        return weight, bias, self.eps, self.offset, result_dtype(self.cast, x, weight, bias)

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again, its weight and bias aside."""
        names = ("width", "eps", "weight_name", "bias_name", "offset", "cast")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        parts = [f"({self.width},)", f"eps={self.eps}"]
        if self._tensor(self.weight_name) is not None:
            parts.append(f"{self.offset:g} + weight" if self.offset else "weight")
        if self._tensor(self.bias_name) is not None:
            parts.append("bias")
        if self.cast != "input":
            parts.append(f"cast={self.cast}")
        return ", ".join(parts)
