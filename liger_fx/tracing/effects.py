"""Which nodes do more than compute their result, so that they may be neither dropped nor moved
across."""

from __future__ import annotations

import builtins
import functools
import operator
from typing import Any

import torch
from torch import fx

from liger_fx.tracing import leaves

_IN_PLACE_OPERATORS = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul,
    operator.imatmul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip
_EFFECTFUL_FUNCTIONS = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    leaves.new_cache,
    leaves.encoder_decoder_cache,
    leaves.cache_call,
    leaves.check,
    leaves.check_result,
    builtins.setattr,
}


def is_region_boundary(node: fx.Node) -> bool:
    """Whether the node opens or closes a no_grad or autocast region."""
    return node.target in (
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    )


def is_effectful(node: fx.Node, root: torch.nn.Module | None = None) -> bool:
    """Whether the node changes a tensor, a cache or the grad or autocast mode.

    ``root`` resolves call_module targets: an in-place activation module
    (``nn.ReLU(inplace=True)``) is effectful.
    """
    if node.op == "call_module":
        if root is None:
            return False
        module = root.get_submodule(str(node.target))
        # A block may change the cache it is given.
        return isinstance(module, fx.GraphModule) or getattr(module, "inplace", False) is True
    if node.op == "call_method":
        return is_in_place_name(str(node.target)) or returns_nothing(str(node.target))
    if node.op != "call_function":
        return False
    if node.target in _IN_PLACE_OPERATORS or node.target in _EFFECTFUL_FUNCTIONS:
        return True
    if "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    name = getattr(node.target, "__name__", "")
    return is_in_place_name(name) or returns_nothing(name)


def is_in_place_name(name: str) -> bool:
    """PyTorch's convention: a trailing underscore (``add_``), which no dunder has."""
    return name.endswith("_") and not name.endswith("__")


@functools.lru_cache(4096)
def returns_nothing(name: str) -> bool:
    """Whether PyTorch's operator of that name is called for what it does alone (``retain_grad``,
    ``_assert_async``)."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    return bool(schemas) and not any(schema.returns for schema in schemas)


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether dropping the node would shift the random numbers of those after it. Of modules that
    are called it tells nothing."""
    if any(node.kwargs.get(name) for name in _RATES):
        return True
    name: Any = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return isinstance(name, str) and name in _RANDOM


# What attention drops of its weights, as PyTorch and as transformers call it.
_RATES = ("dropout_p", "dropout")
_RANDOM = {
    "dropout", "alpha_dropout", "feature_dropout", "rand", "rand_like", "randn", "randn_like",
    "randint", "randint_like", "randperm", "bernoulli", "multinomial", "normal",
    "gumbel_softmax", "poisson",
}  # fmt: skip
