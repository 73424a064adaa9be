"""The calls that are verified: those asked for, and one for each graph that the model has already.

inputs=None, a model with a graph for (input_ids, attention_mask) in train mode
    ->  four calls with labels in eval mode; one of input_ids and attention_mask in train mode
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from liger_fx.errors import UsageError
from liger_fx.inputs import SHAPES, example_inputs, further_inputs
from liger_fx.model.block import Block
from liger_fx.model.plan import Plan
from liger_fx.tracing.call import UnsupportedCall, named_arguments
from liger_fx.verification.reference import to_dtype


@dataclass(frozen=True)
class Call:
    """Arguments, and the modes in which the model is called with them."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    training: bool = False
    grad: bool = True

    def named(self, forward: Any) -> dict[str, Any] | None:
        """The arguments by name; None for a call that no graph can serve."""
        try:
            return named_arguments(forward, self.args, self.kwargs)
        except UnsupportedCall:
            return None


def calls_of(model: nn.Module, inputs: Any, draw: int = 0) -> list[Call]:
    """The calls that ``inputs`` ask for; made for a transformers language model when None.

    draw: 0 are the calls themselves; of another draw are calls of the same shapes with other
    random numbers or, where ``inputs`` are given, with their tokens and floats in another order.
    """
    if inputs is None:
        first = draw * len(SHAPES)
        made = (example_inputs(model, *shape, seed=first + i) for i, shape in enumerate(SHAPES))
        return [Call(kwargs=kwargs) for kwargs in made]
    if draw:
        inputs = _shuffled(inputs, torch.Generator().manual_seed(draw))
    if isinstance(inputs, Mapping):
        return [Call(kwargs=dict(inputs))]
    if isinstance(inputs, tuple):
        return [Call(inputs)]
    raise UsageError(
        f"inputs are a {type(inputs).__name__}; pass keyword arguments as a mapping, or a tuple."
    )


def _shuffled(inputs: Any, generator: torch.Generator) -> Any:
    """The inputs with the elements of each floating tensor, and of tokens, in another order."""

    def shuffle(name: Any, value: Any) -> Any:
        drawn = isinstance(value, torch.Tensor) and (
            value.is_floating_point() or str(name).endswith("input_ids")
        )
        if not drawn:
            return value
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.detach().flatten()[order].view(value.shape).requires_grad_(value.requires_grad)

    if isinstance(inputs, Mapping):
        return {name: shuffle(name, value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(shuffle(place, value) for place, value in enumerate(inputs))
    return inputs


def calls_of_plans(opt: Block, calls: Sequence[Call]) -> tuple[list[Call], list[str]]:
    """A call for each graph of ``opt`` that none of ``calls`` is for; and which have none."""
    found, remarks = [], []
    for plan in opt.plans:
        own = next(_own_calls(opt, plan, calls), None)
        if own is None:
            names = ", ".join(plan.guards.call.arguments)
            remarks.append(f"the graph for {names} was not run: it holds for no call made here")
        elif not any(own is call for call in calls):
            found.append(own)
    return found, remarks


def _own_calls(opt: Block, plan: Plan, calls: Sequence[Call]) -> Iterator[Call]:
    """The given calls that the plan serves as they are; then calls made for it."""
    training, grad = plan.guards.training, plan.guards.grad_enabled is not False
    for call in calls:
        if (call.training, call.grad) == (training, grad) and _serves(opt, plan, call):
            yield call
    constants = plan.guards.call.constants
    for base in _bases(opt, calls):
        names = plan.guards.call.arguments.keys() - constants.keys()
        if base.keys() >= names:
            tensors = {name: base[name] for name in names}
            call = Call((), {**tensors, **constants}, training, grad)
            if _serves(opt, plan, call):
                yield call


def _bases(opt: Block, calls: Sequence[Call]) -> Iterator[dict[str, Any]]:
    """Tensors by name, to choose a graph's inputs from: the given ones, else made ones."""
    for call in calls:
        yield call.named(opt.block_class.forward) or {}
    try:
        made = example_inputs(opt, *SHAPES[0])
    except UsageError:
        return
    ids = made.get("input_ids")
    yield made if ids is None else {**further_inputs(opt, ids), **made}


def _serves(opt: Block, plan: Plan, call: Call) -> bool:
    """Whether this plan is the one that serves the call."""
    given = call.named(opt.block_class.forward)
    if given is None:
        return False
    with called_as(call, opt):
        return opt.serving(given) is plan


@contextmanager
def called_as(call: Call, *models: nn.Module) -> Iterator[None]:
    """The modes of the call; afterwards every module is as it was. Nothing random is drawn.

    In train mode dropout is left out and other random numbers begin with one seed: float64 would
    draw others.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(call.grad))
        if call.training:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
            stack.enter_context(_WithoutDropout())
        try:
            for model in models:
                model.train(call.training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode


_DROPOUT = (
    torch.dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
    F.feature_alpha_dropout,
)  # fmt: skip


class _WithoutDropout(TorchFunctionMode):
    """Dropout gives what it is given; attention drops nothing."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if kwargs.get("dropout_p"):
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def in_dtype(call: Call, dtype: torch.dtype) -> Call:
    """The call with every floating tensor in this dtype."""
    args, kwargs = to_dtype((call.args, call.kwargs), dtype)
    return Call(args, kwargs, call.training, call.grad)
