"""LigerMLP: the plain MLP, around the model's own linears.

(mlp): CLIPMLP(                              (mlp): LigerMLP(
  (activation_fn): GELUActivation()    ->      768 -> 3072, activation=gelu
  (fc1): Linear(...)                           (fc1): Linear(...)
  (fc2): Linear(...)                           (fc2): Linear(...)
)                                            )
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from liger_fx.kernels.activation import activation as apply_activation
from liger_fx.kernels.activation import check_activation
from liger_fx.modules.calling import caller
from liger_fx.modules.linears import adopt, sizes
from liger_fx.modules.origin import NamedModule


class LigerMLP(NamedModule):
    """fc2(activation(fc1(x))).

    children: the original linear layers (any callable modules) under their original names, in
        their original order.
    fc1, fc2: the names of those children that have these roles.
    activation: one of liger_fx.kernels.activation.ACTIVATIONS.
    ValueError for a name that is no child and for an unknown activation.
    """

    def __init__(
        self, children: Mapping[str, nn.Module], *, fc1: str, fc2: str, activation: str
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.roles = {"fc1": fc1, "fc2": fc2}
        adopt(self, children, **self.roles)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., hidden). Returns (..., hidden), in what dtype fc2 makes of it."""
        call = caller()
        inner = apply_activation(call(self._child("fc1"), hidden_states), self.activation)
        return call(self._child("fc2"), inner)

    def _child(self, role: str) -> Any:
        return self._modules[self.roles[role]]

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again, around its children."""
        return {**self.roles, "activation": self.activation}

    def extra_repr(self) -> str:
        shape = sizes(self._child("fc1"), self._child("fc2"))
        return ", ".join(filter(None, [shape, f"activation={self.activation}"]))
