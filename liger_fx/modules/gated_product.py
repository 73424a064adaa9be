"""LigerSwiGLU, LigerGEGLU, LigerReGLU: activation and product of a gated MLP, without its linears;
LigerSigmoidGate: a product with a gate of any kind.

silu(gate) * up             ->  (act): LigerSwiGLU(activation=silu)
first, second = x.chunk(2, -1); gelu(first) * second
                            ->  (act): LigerGEGLU(activation=gelu)
attention * sigmoid(gate)   ->  (sigmoid_gate): LigerSigmoidGate(activation=sigmoid)
"""

from typing import Any, ClassVar

import torch
from torch import nn

from liger_fx.kernels.gated_activation import gated_activation, packed_gated_activation
from liger_fx.modules.origin import NamedModule


def chosen_activation(module: nn.Module, known: tuple[str, ...], activation: str | None) -> str:
    """`activation`, or the first of `known` for None; ValueError where it is not among them."""
    if activation is None:
        return known[0]
    if activation not in known:
        raise ValueError(f"{type(module).__name__} computes {' or '.join(known)}, not {activation}")
    return activation


class _GatedProduct(NamedModule):
    """activation: one of `activations`, the first by default.
    gate_first: for packed input, whether gate is the first half of the last dimension.
    width: of the result, for the repr alone.
    """

    activations: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        activation: str | None = None,
        *,
        gate_first: bool = True,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = chosen_activation(self, self.activations, activation)
        self.gate_first = gate_first
        self.width = width

    def forward(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """gate, up: (..., width); or gate alone, both packed in (..., 2 * width).
        Returns activation(gate) * up, (..., width).
        """
        if up is None:
            return packed_gated_activation(gate, self.activation, self.gate_first)
        return gated_activation(gate, up, self.activation)

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again."""
        return {name: getattr(self, name) for name in ("activation", "gate_first", "width")}

    def extra_repr(self) -> str:
        parts = [] if self.width is None else [str(self.width)]
        parts.append(f"activation={self.activation}")
        if not self.gate_first:
            parts.append("gate_first=False")
        return ", ".join(parts)


class LigerSwiGLU(_GatedProduct):
    """silu(gate) * up."""

    activations = ("silu",)


class LigerGEGLU(_GatedProduct):
    """gelu(gate) * up, gelu by the error function, by tanh or by a sigmoid."""

    activations = ("gelu", "gelu_tanh", "quick_gelu")


class LigerReGLU(_GatedProduct):
    """relu(gate) * up, or that of its square."""

    activations = ("relu", "relu_squared")


class LigerSigmoidGate(_GatedProduct):
    """sigmoid(gate) * up. It may stand anywhere: where the two do not lie in memory alike, in rows,
    PyTorch's own operations run, whose result lies as the model's code has it."""

    activations = ("sigmoid",)

    def forward(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """gate, up: (..., width). Returns sigmoid(gate) * up, (..., width)."""
        if up is not None and (gate.stride() != up.stride() or gate.stride(-1) != 1):
            return torch.sigmoid(gate) * up
        return super().forward(gate, up)
