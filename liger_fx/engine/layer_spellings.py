"""The spellings of what neural networks are made of: activations, dropout, linear layers, norms.

    F.silu(x), nn.SiLU(inplace=True)(x)          ->  silu(x)
    F.gelu(x, approximate="tanh")                ->  gelu_tanh(x)
    nn.Linear, quantised and LoRA linear layers  ->  linear(x, module="model.layers.0.mlp.up_proj")
    F.rms_norm(x, shape, w, eps), nn.RMSNorm     ->  rms_norm(x, w, eps=eps)
    F.layer_norm(x, shape, w, None, eps)         ->  layer_norm(x, w, 0, eps=eps)
    nn.LayerNorm                                 ->  layer_norm(x, module="model.norm", eps=eps)
    transformers' experts of a mixture           ->  experts(x, index, weights, module="...experts")
    F.cross_entropy(logits, labels)              ->  cross_entropy(logits, labels, reduction="mean")

What takes several operators to say (x * sigmoid(x), GELU's tanh form) is a pattern: activations.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from liger_fx.engine.spellings import Lowering, argument
from liger_fx.engine.term import Term
from liger_fx.engine.view import View
from liger_fx.modules import LigerAddLayerNorm, LigerAddRMSNorm
from liger_fx.tracing.leaf_modules import is_experts, is_linear


def _dropout(view: View, node: fx.Node) -> Term:
    """Of probability 0 it is an alias. In eval mode it is not: the module may train later."""
    p = argument(node, 1, "p", default=0.5)
    return view.make("alias" if p == 0 else "dropout", (node.args[0],), node)


def _activation(op: str) -> Lowering:
    """In place or not: whether something else would notice is for legality.py to say."""

    def lower(view: View, node: fx.Node) -> Term:
        return view.make(op, (argument(node, 0, "input"),), node)

    return lower


def _gelu(view: View, node: fx.Node) -> Term | None:
    approximate = argument(node, 1, "approximate", default="none")
    op = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return view.make(op, (argument(node, 0, "input"),), node) if op else None


def _linear(view: View, node: fx.Node) -> Term | None:
    """F.linear: the weight is no child module's, which ``module=None`` says."""
    return view.make("linear", (argument(node, 0, "input"),), node, module=None)


def _rms_norm(view: View, node: fx.Node) -> Term | None:
    shape = argument(node, 1, "normalized_shape")
    x, weight = argument(node, 0, "input"), argument(node, 2, "weight")
    if len(shape) != 1:
        return None
    operands = (x,) if weight is None else (x, weight)
    return view.make("rms_norm", operands, node, eps=argument(node, 3, "eps"), module=None)


def _layer_norm(view: View, node: fx.Node) -> Term | None:
    """A weight that is not there is 1, and a bias 0; ``rank``: over how many dimensions it is."""
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    factors = (1 if weight is None else weight, 0 if bias is None else bias)
    return view.make(
        "layer_norm", (argument(node, 0, "input"), *factors), node,
        eps=argument(node, 4, "eps", default=1e-5), module=None,
        rank=len(argument(node, 1, "normalized_shape")),
    )  # fmt: skip


def _cross_entropy(view: View, node: fx.Node) -> Term | None:
    """``weighted``: with weights of classes, or a reduction in the old spelling."""
    names = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    places = dict(zip(names, range(2, 8), strict=True))
    given = {name: argument(node, place, name) for name, place in places.items()}
    logits, labels = argument(node, 0, "input"), argument(node, 1, "target")
    return view.make(
        "cross_entropy", (logits, labels), node,
        ignore_index=-100 if given["ignore_index"] is None else given["ignore_index"],
        reduction=given["reduction"] or "mean",
        smoothing=given["label_smoothing"] or 0.0,
        weighted=any(given[name] is not None for name in ("weight", "size_average", "reduce")),
    )  # fmt: skip


_TABLE: list[tuple[Lowering, tuple[str, ...], tuple[Any, ...]]] = [
    (_dropout, ("alias", "dropout"), (F.dropout, torch.dropout)),
    (_activation("silu"), ("silu",), (F.silu,)),
    (_activation("relu"), ("relu",), (F.relu, torch.relu, torch.relu_, "relu", "relu_")),
    (_activation("sigmoid"), ("sigmoid",), (torch.sigmoid_, "sigmoid_")),
    (_gelu, ("gelu", "gelu_tanh"), (F.gelu,)),
    (_linear, ("linear",), (F.linear,)),
    (_rms_norm, ("rms_norm",), (F.rms_norm, torch.rms_norm)),
    (_layer_norm, ("layer_norm",), (F.layer_norm, torch.layer_norm)),
    (_cross_entropy, ("cross_entropy",), (F.cross_entropy,)),
]


def _inside_adapters(module: Any) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    inside: nn.Module = module
    return inside


LAYERS = {target: (lower, ops) for lower, ops, targets in _TABLE for target in targets}
MODULE_OPS = {
    "linear", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "alias", "dropout",
    "silu", "relu", "gelu", "gelu_tanh", "cross_entropy", "experts",
}  # fmt: skip
# Named modules that were put there for another call, and are called with a sum again.
_ADDING: dict[type[nn.Module], str] = {
    LigerAddLayerNorm: "add_layer_norm", LigerAddRMSNorm: "add_rms_norm"
}  # fmt: skip


def lower_module(view: View, node: fx.Node, module: nn.Module) -> Term | None:
    """A leaf module as the operator it computes; None where it is none of these."""
    if isinstance(module, nn.CrossEntropyLoss):
        return view.make(
            "cross_entropy", (argument(node, 0, "input"), argument(node, 1, "target")), node,
            ignore_index=module.ignore_index, reduction=module.reduction,
            smoothing=module.label_smoothing, weighted=module.weight is not None,
        )  # fmt: skip
    if len(node.args) == 3 and not node.kwargs and is_experts(_inside_adapters(module)):
        return view.make("experts", node.args, node, module=node.target)
    x = argument(node, 0, "input", "x", "hidden_states")
    if not isinstance(x, fx.Node) or len(node.args) + len(node.kwargs) != 1:
        return None
    if is_linear(module):
        attributes: dict[str, Any] = {"module": node.target}
        if hasattr(module, "base_layer"):
            attributes["is_adapted"] = True
        return view.make("linear", (x,), node, **attributes)
    if type(module) in _ADDING:
        return view.make(_ADDING[type(module)], (x,), node, module=node.target)
    if not type(module).__module__.startswith("torch.nn"):
        return None
    match module:
        case nn.RMSNorm() if len(module.normalized_shape) == 1:
            return view.make("rms_norm", (x,), node, eps=module.eps, module=node.target)
        case nn.LayerNorm():
            rank = len(module.normalized_shape)
            return view.make(
                "layer_norm", (x,), node, eps=module.eps, module=node.target, rank=rank
            )
        case nn.Dropout():
            return view.make("alias" if module.p == 0 else "dropout", (x,), node)
        case nn.Identity():
            return view.make("alias", (x,), node)
        case nn.GELU():
            return view.make("gelu" if module.approximate == "none" else "gelu_tanh", (x,), node)
        case nn.SiLU() | nn.ReLU() | nn.Sigmoid() | nn.Tanh():
            return view.make(type(module).__name__.lower(), (x,), node)
    return None
