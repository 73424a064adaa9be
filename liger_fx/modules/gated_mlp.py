"""LigerSwiGLUMLP, LigerGEGLUMLP, LigerReGLUMLP: the gated MLP, around the model's own linears.

(mlp): LlamaMLP(                             (mlp): LigerSwiGLUMLP(
  (gate_proj): Linear(...)                     4096 -> 14336, activation=silu
  (up_proj): Linear(...)               ->      (gate_proj): Linear(...)
  (down_proj): Linear(...)                     (up_proj): Linear(...)
  (act_fn): SiLUActivation()                   (down_proj): Linear(...)
)                                            )
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from liger_fx.kernels.gated_activation import gated_activation, packed_gated_activation
from liger_fx.kernels.gated_linear import gated_linear
from liger_fx.kernels.launch import uses_triton
from liger_fx.modules.calling import caller, only_runs_forward
from liger_fx.modules.gated_product import chosen_activation
from liger_fx.modules.linears import adopt, sizes
from liger_fx.modules.origin import NamedModule


class _GatedMLP(NamedModule):
    """down(activation(gate(x)) * up(x)), or with gate and up as the halves of one packed linear.

    children: the original linear layers (any callable modules) under their original names, in
        their original order.
    down, gate, up: the names of those children that have these roles; or
    down, gate_up, gate_first: where one child computes both, and whether gate is its first half.
    activation: one of `activations`, the first by default.
    ValueError for a name that is no child, an unknown activation, or neither pair of roles.
    """

    activations: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        *,
        down: str,
        gate: str | None = None,
        up: str | None = None,
        gate_up: str | None = None,
        gate_first: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        named = {"gate": gate, "up": up, "gate_up": gate_up}
        roles = {role: name for role, name in named.items() if name is not None}
        if set(roles) not in ({"gate", "up"}, {"gate_up"}):
            raise ValueError("a gated MLP needs the names of gate and up, or of gate_up alone")
        self.activation = chosen_activation(self, self.activations, activation)
        self.gate_first = gate_first
        self.roles = {**roles, "down": down}
        adopt(self, children, **self.roles)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., hidden). Returns (..., hidden), in what dtype `down` makes of it."""
        call, roles, children = caller(), self.roles, self._modules
        up: torch.Tensor | None = None
        if "gate_up" in roles:
            gate = call(children[roles["gate_up"]], hidden_states)
        else:
            gate = call(children[roles["gate"]], hidden_states)
            up = call(children[roles["up"]], hidden_states)
        down: Any = children[roles["down"]]
        if _keeps_a_product(down, gate):
            result: torch.Tensor = gated_linear(
                gate, up, down.weight, down.bias, self.activation, self.gate_first
            )
            return result
        if up is None:
            product = packed_gated_activation(gate, self.activation, self.gate_first)
        else:
            product = gated_activation(gate, up, self.activation)
        return call(down, product)

    def _child(self, role: str) -> Any:
        return self._modules[self.roles[role]]

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again, around its children."""
        return {**self.roles, "gate_first": self.gate_first, "activation": self.activation}

    def extra_repr(self) -> str:
        shape = sizes(self._child("gate_up" if self._packed else "gate"), self._child("down"))
        parts = [] if shape is None else [shape]
        parts.append(f"activation={self.activation}")
        if self._packed:
            parts.append("packed" if self.gate_first else "packed, gate_first=False")
        return ", ".join(parts)

    @property
    def _packed(self) -> bool:
        return "gate_up" in self.roles


# Elements of a product that is kept all the same: some megabytes, against the 40 microseconds that
# the operator takes longer to call.
_SMALL = 1 << 22


def _keeps_a_product(down: nn.Module, gate: torch.Tensor) -> bool:
    """Whether a call of ``down`` would keep a large input for a backward on a GPU: a plain linear
    layer that is trained."""
    return (
        torch.is_grad_enabled()
        and _is_large(gate)
        and type(down) is nn.Linear
        and down.weight.requires_grad
        and uses_triton(gate, down.weight)
        and gate.dtype is down.weight.dtype
        and only_runs_forward(down)
        and not torch.is_autocast_enabled(gate.device.type)
    )


def _is_large(product: torch.Tensor) -> bool:
    """No for a size that is symbolic: a trace must not depend on the answer."""
    size = product.numel()
    return isinstance(size, int) and size > _SMALL


class LigerSwiGLUMLP(_GatedMLP):
    """down(silu(gate(x)) * up(x)): see `_GatedMLP` for the arguments."""

    activations = ("silu",)


class LigerGEGLUMLP(_GatedMLP):
    """down(gelu(gate(x)) * up(x)), gelu by the error function, by tanh or by a sigmoid."""

    activations = ("gelu", "gelu_tanh", "quick_gelu")


class LigerReGLUMLP(_GatedMLP):
    """down(relu(gate(x)) * up(x)), or that of its square."""

    activations = ("relu", "relu_squared")
