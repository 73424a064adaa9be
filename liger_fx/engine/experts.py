"""What transformers' experts of a mixture compute, read off the functions that a call of them runs.

A class of experts has transformers choose its forward by the config
(`use_experts_implementation`): "grouped_mm" is one function for all classes, which looks at a few
flags of the module and calls its `_apply_gate` and `act_fn`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import activations
from transformers.integrations import moe

from liger_fx.tracing.tree_state import hooks_of


@moe.use_experts_implementation
class _Dispatched(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self) -> None: ...


# What every class has for a forward that chooses.
_DISPATCH = _Dispatched.forward.__code__

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    nn.ReLU: "relu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu_squared",
}


def why_not_gated_and_grouped(module: Any) -> str | None:
    """Why a call is not transformers' grouped_mm of experts that are gated MLPs and no more; None
    if it is."""
    kind = type(module)
    if getattr(kind.forward, "__code__", None) is not _DISPATCH or "forward" in vars(module):
        return f"{kind.__name__} has a forward of its own"
    held = inspect.getclosurevars(kind.forward).nonlocals
    name = module.config._experts_implementation
    known = held.get("experts_interface", moe.ALL_EXPERTS_FUNCTIONS)
    chosen = known.get(name, held["original_forward"])
    if chosen is not moe.grouped_mm_experts_forward:
        return f"its experts_implementation is {name}, not transformers' grouped_mm"
    # What an earlier version of transformers does not ask, none of its classes has. (Processes were
    # joined by a hook on the layer then.)
    if not getattr(module, "has_gate", True):
        return "its experts have no gate"
    if kind._apply_gate is not moe._default_apply_gate or "_apply_gate" in vars(module):
        return f"{kind.__name__} has an _apply_gate of its own"
    if module.has_bias:
        return "its experts have biases"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm stands behind each expert"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    return None


def activation_of(module: Any) -> str | None:
    """Which of liger_fx.kernels.activation's a module's act_fn is; None for another."""
    function = module.act_fn
    kind = type(function)
    if not isinstance(function, nn.Module) or "forward" in vars(function):
        return None
    if any(hooks_of(function)):
        return None
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(kind)
