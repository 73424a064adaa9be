"""How an operator of this folder reaches PyTorch: torch.ops.liger_fx.<name>.

    define_op("f(Tensor x) -> Tensor", run, fake)      the operator, with what fake tensors see
    differentiate(op, Function, reference)             its derivatives

torch.compile and torch.export see each operator as one node. The derivative is registered by hand
on the Autograd key: torch.library.register_autograd does the same and costs 12 microseconds more
per forward and backward, which is longer than a small kernel runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("liger_fx", "FRAGMENT")


def define_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define torch.ops.liger_fx.<name of schema> and return its overload.

    `run` computes on every device; `fake` makes empty results of the same shapes, strides and
    dtypes. Schemas here have neither defaults nor keyword-only arguments, so that both are always
    called with every argument, by position.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liger_fx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.liger_fx, name).default


def below_autograd(op: Any, *args: Any) -> Any:
    """Call `op` without recording it: what the forward of its autograd.Function does."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def differentiate(
    op: Any, function: type[torch.autograd.Function], reference: Callable[..., Any]
) -> None:
    """Run `function` (whose forward takes `op`'s arguments) where `op` is to be differentiated.

    Mark its backward `once_differentiable`: second derivatives then raise instead of being zero.
    `reference` takes the same arguments and is made of PyTorch's own operations. It runs where the
    tensors are not plain ones: inside torch.func's grad, jvp, vmap, hessian and the like, which
    take each of its operations apart, and inside torch.autograd.forward_ad.
    """

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # forward mode does not ask for requires_grad
            return reference(*args)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.requires_grad:
                    return function.apply(*args)
        return below_autograd(op, *args)

    _LIBRARY.impl(op, autograd, "Autograd")
    # This key is asked first of all while a transform of torch.func is active, and never else.
    _LIBRARY.impl(op, reference, "FuncTorchDynamicLayerFrontMode")
