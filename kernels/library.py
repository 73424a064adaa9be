"""How an operator of this folder reaches PyTorch: torch.ops.liger_fx.<name>.

    define_op("f(Tensor x) -> Tensor", run, fake)      the operator, with what fake tensors see
    differentiate(op, Function, reference)             its derivatives

torch.compile and torch.export see each operator as one node. Nothing of that is wanted where plain
tensors are computed at once, and PyTorch's dispatcher takes 14 microseconds to a Python operator
and back, longer than a small kernel runs: there the operator's own code is called.

The derivative is registered by hand on the Autograd key: torch.library.register_autograd does the
same and costs 12 microseconds more per forward and backward.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from liger_fx.kernels.compile_ahead import compiles_ahead
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.replay import Replayed

# What an autograd.Function computes by: see `differentiate`.
Compute = Callable[..., Any]

_LIBRARY = torch.library.Library("liger_fx", "FRAGMENT")
# What takes no part in the dispatch: no subclass of a tensor, no symbolic number.
_PLAIN = frozenset((torch.Tensor, nn.Parameter, bool, int, float, str, type(None), torch.dtype))
_dispatch_modes, _function_modes, _transforms, _jit_trace = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)


@dataclass(frozen=True)
class InSteps:
    """What computes an operator in two steps, between which the inputs of its derivative are saved.

    begin: gives the results, computed or not; those that the derivative needs are. finish: takes
    the results and the arguments, and computes the rest in place.

    A checkpoint computes a layer again down to what is saved last and no further. PyTorch's linear
    saves its input before it multiplies; so does the product of such an operator not come twice.
    """

    begin: Callable[..., Any]
    finish: Callable[..., None]

    def __call__(self, *args: Any) -> Any:
        results = self.begin(*args)
        self.finish(results, *args)
        return results


class Op:
    """An operator: called with plain tensors it computes, else PyTorch dispatches it.

    overload: torch.ops.liger_fx.<name>.default. run: what computes. apply: records its derivative,
    and computes by what it is given last.
    """

    def __init__(self, overload: Any, run: Callable[..., Any] | InSteps) -> None:
        self.overload, self.run = overload, run
        self.begin: Callable[..., Any] = run
        self.finish: Callable[..., None] | None = None
        # A replay that is not on a GPU computes plainly; a step of Python less is worth a look.
        self.plain = run.plain if isinstance(run, Replayed) and not INTERPRETED else None
        if isinstance(run, InSteps):
            self.begin, self.finish = run.begin, run.finish
        self.apply: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        # (Exports and other compilers come with tensors of their own.)
        if torch.compiler.is_dynamo_compiling() or not at_once(args):
            return self.overload(*args)
        if self.apply is not None and torch.is_grad_enabled() and _asks_gradient(args):
            results = self.apply(*args, self.begin)
            if self.finish is not None:
                with torch.no_grad():
                    self.finish(results, *args)
            return results
        if self.plain is not None and not args[0].is_cuda:
            return self.plain(*args)
        return self.run(*args)


def at_once(args: tuple[Any, ...]) -> bool:
    """Whether nothing stands between these arguments and what computes: no mode, no transform of
    torch.func, no forward mode, no trace; or nothing is computed, and kernels compiled ahead."""
    return (
        _PLAIN.issuperset(map(type, args))
        and not _dispatch_modes()
        and not _function_modes()
        and _transforms() is None
        and forward_ad._current_level < 0
        and _jit_trace() is None
    ) or compiles_ahead()


def _asks_gradient(args: tuple[Any, ...]) -> bool:
    for arg in args:  # noqa: SIM110 - a generator takes twice the time
        if isinstance(arg, torch.Tensor) and arg.requires_grad:
            return True
    return False


def define_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Op:
    """Define torch.ops.liger_fx.<name of schema>.

    `run` computes on every device; `fake` makes empty results of the same shapes, strides and
    dtypes. Schemas here have neither defaults nor keyword-only arguments, so that both are always
    called with every argument, by position.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liger_fx::{name}", fake, lib=_LIBRARY)
    return Op(getattr(torch.ops.liger_fx, name).default, run)


def below_autograd(op: Op, *args: Any) -> Any:
    """Call `op` without recording it."""
    if not torch.compiler.is_dynamo_compiling() and at_once(args):
        return op.run(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op.overload(*args)


def differentiable(again: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a Function's backward that computes by kernels. Where it is to be differentiated itself
    (``create_graph=True``), ``again``, called in its place, gives the same gradients by operations
    that can be (`gradients_of`), or raises (`refused`)."""

    def mark(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def choose(ctx: Any, *grads: Any) -> Any:
            return (again if torch.is_grad_enabled() else backward)(ctx, *grads)

        return choose

    return mark


def gradients_of(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    grads: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of ``function`` for these gradients of its results, one for each input, None
    where it is not ``wanted``; they can be differentiated again by the inputs and ``grads``."""
    # A view of each, so that what one input owes to another is no part of the other's gradient.
    own = [x.view_as(x) if want else x for x, want in zip(inputs, wanted, strict=True)]
    results = function(*own)
    pairs = zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
    given = [(result, grad) for result, grad in pairs if grad is not None]
    asked = [x for x, want in zip(own, wanted, strict=True) if want]
    made = iter(
        torch.autograd.grad(
            [result for result, _ in given],
            asked,
            [grad for _, grad in given],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(made) if want else None for want in wanted)


def refused(backward: Callable[..., Any], message: str) -> Callable[..., Any]:
    """For `differentiable`: the gradients that ``backward`` gives, which raise RuntimeError with
    this message once they are differentiated, whatever their own gradient is."""

    def again(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            made = backward(ctx, *grads)
        asking: list[Any] = [g if g is None else g.detach().requires_grad_() for g in made]
        return torch._C._functions.DelayedError(message.encode(), len(asking))(*asking)

    return again


def differentiate(
    op: Op, function: type[torch.autograd.Function], reference: Callable[..., Any]
) -> None:
    """Run `function` where `op` is to be differentiated. Its forward takes `op`'s arguments and
    what computes `op` of them, and does not ask again how to call it.

    Mark its backward `differentiable`: second derivatives are zero without a word where it is made
    of operators that have none. (`once_differentiable` raises only where a gradient that comes in
    requires one, which that of a sum does not.)
    `reference` takes the same arguments and is made of PyTorch's own operations. It runs where the
    tensors are not plain ones: inside torch.func's grad, jvp, vmap, hessian and the like, which
    take each of its operations apart, and inside torch.autograd.forward_ad.
    """

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # forward mode does not ask for requires_grad
            return reference(*args)
        if torch.is_grad_enabled() and _asks_gradient(args):
            return function.apply(*args, below)
        return below(*args)

    below = functools.partial(below_autograd, op)
    # Function.apply without its questions about transforms, which `at_once` has asked.
    op.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    _LIBRARY.impl(op.overload, autograd, "Autograd")
    # This key is asked first of all while a transform of torch.func is active, and never else.
    _LIBRARY.impl(op.overload, reference, "FuncTorchDynamicLayerFrontMode")
