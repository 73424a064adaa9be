"""The model that comes out: a torch.fx.GraphModule that is still the user's transformers model.

    LlamaForCausalLM(input_ids)                                 the graph traced for such a call
    LlamaForCausalLM(input_ids, labels=labels)                  traced at its first use, then kept
    LlamaForCausalLM(input_ids, past_key_values=cache)          the class's own forward, said once

Its class derives from GraphModule and from the model's own class, so ``isinstance``, ``config``,
``generate``, ``save_pretrained`` and the Trainer see what they know.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from liger_fx.errors import FallbackWarning, LigerFxError
from liger_fx.plan import Plan
from liger_fx.refusals import Refusals
from liger_fx.report import GraphDiff
from liger_fx.tracing.call import (
    CallSpec,
    UnsupportedCall,
    describe_call,
    named_arguments,
    with_sizes_of,
)

# Each kind of call costs a trace and a graph; a model called in more ways than this has a
# plain argument that changes at every call.
_MAX_PLANS = 16

MakePlan = Callable[[nn.Module, CallSpec], Plan]


class _BareInit(nn.Module):
    """Ends GraphModule's chain of __init__: the model's own one would build new weights."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class GraphModel(fx.GraphModule):
    """What ``liger_fx.optimize`` and ``liger_fx.trace`` return; subclasses also derive from a
    model class.

    ``plans`` hold one graph for each kind of call met so far, the first of them as ``.graph``.
    """

    model_class: type[nn.Module]

    def __init__(self, attributes: dict[str, Any], plans: list[Plan], make_plan: MakePlan) -> None:
        # Built around an empty graph: GraphModule copies what a graph refers to, and here it is
        # all in place.
        super().__init__(nn.Module(), fx.Graph(), class_name=self.model_class.__name__)
        type(self).__qualname__, type(self).__module__ = (
            self.model_class.__qualname__,
            self.model_class.__module__,
        )
        self.__dict__.update(attributes)
        self.plans = plans
        self._make_plan = make_plan
        self._warned: set[str] = set()
        self._refusals = Refusals()
        self._graph = plans[0].graph
        self._graph.owning_module = self
        del self._code  # the empty graph's; this one's is written when somebody asks for it

    @property
    def code(self) -> str:
        """The Python code of ``.graph``."""
        if "_code" not in self.__dict__:
            self.recompile()
        return super().code

    @property
    def report(self) -> GraphDiff | None:
        """What was rewritten in ``.graph``, and why the rest was not; None for a plain trace."""
        return self.plans[0].report

    def recompile(self) -> Any:
        """Compile ``.graph`` anew after it was edited; it serves the calls it was traced for."""
        code = super().recompile()
        # GraphModule installs the generated function as forward; here forward chooses the graph.
        generated = type(self).__dict__["forward"]
        del type(self).forward
        if "plans" in self.__dict__:
            self.plans[0].graph = self._graph
            self.plans[0].recompile(generated)
        return code

    def call_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph that serves this call; trace one if there is none, else the model's own
        forward."""
        try:
            arguments = named_arguments(self.model_class.forward, args, kwargs)
        except UnsupportedCall as unsupported:
            return self._run_original(f"the call has {unsupported}", args, kwargs)
        for plan in self.plans:
            if plan.holds(self, arguments):
                return plan.run(self, arguments)
        try:
            call = describe_call(self, arguments)
        except UnsupportedCall as unsupported:
            return self._run_original(str(unsupported), args, kwargs)
        known = self._refusals.reason(self, arguments)
        if known is not None:
            return self._run_original(known, args, kwargs)
        try:
            plan = self._new_plan(call, arguments)
        except (UnsupportedCall, LigerFxError) as reason:
            self._refusals.remember(self, arguments, str(reason))
            return self._run_original(str(reason), args, kwargs)
        return plan.run(self, arguments)

    def _new_plan(self, call: CallSpec, arguments: dict[str, Any]) -> Plan:
        if len(self.plans) >= _MAX_PLANS:
            raise UnsupportedCall(
                f"it is called in more than {_MAX_PLANS} ways, this time with "
                f"{', '.join(sorted(arguments))}"
            )
        # Example sizes first; where the model's code asks something of the sizes that these do not
        # answer as the call's do, the call's own.
        for candidate in (call, with_sizes_of(call, arguments)):
            plan = self._make_plan(self, candidate)
            if plan.holds(self, arguments):
                self.plans.append(plan)
                return plan
        raise UnsupportedCall("the model's code asks of these sizes what no graph can promise")

    def _run_original(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.warn_once(
            "no graph serves this call, so the model's own forward runs, with the named modules in "
            f"place: {reason.rstrip('.')}."
        )
        return self.model_class.forward(self, *args, **kwargs)

    def warn_once(self, text: str) -> None:
        """Give a FallbackWarning, the first time it has this text."""
        if text not in self._warned:
            self._warned.add(text)
            name = self.model_class.__name__
            warnings.warn(f"{name}: {text}", FallbackWarning, stacklevel=5)

    def __str__(self) -> str:
        """The module tree under the modules' true names; ``.code`` and ``.graph`` show the
        graph."""
        return nn.Module.__repr__(self)

    __repr__ = __str__

    def _attributes(self) -> dict[str, Any]:
        """What the module tree's root holds, without what GraphModule keeps for its graph."""
        own = {
            "_graph",
            "_code",
            "_lineno_map",
            "_prologue_start",
            "plans",
            "_make_plan",
            "_warned",
            "_refusals",
        }
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModel:
        cls = graph_class(self.model_class)
        twin = cls.__new__(cls)
        memo[id(self)] = twin
        attributes = copy.deepcopy(self._attributes(), memo)
        plans = [_copy_plan(plan) for plan in self.plans]
        GraphModel.__init__(twin, attributes, plans, self._make_plan)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model_class, self._attributes(), self.plans, self._make_plan)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _copy_plan(plan: Plan) -> Plan:
    twin = Plan.__new__(Plan)
    twin.__setstate__(plan.__getstate__())
    return twin


def graph_class(model_class: type[nn.Module]) -> type[GraphModel]:
    """The GraphModel class that is also a ``model_class``, under its name and with its forward's
    signature; one for each model class."""
    if model_class not in _GRAPH_CLASSES:
        _GRAPH_CLASSES[model_class] = _derive(model_class)
    return _GRAPH_CLASSES[model_class]


_GRAPH_CLASSES: dict[type[nn.Module], type[GraphModel]] = {}


def _derive(model_class: type[nn.Module]) -> type[GraphModel]:
    @functools.wraps(model_class.forward)
    def forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            # Imported here, for it takes the compiler with it.
            from liger_fx.uncompiled import call_uncompiled

            return call_uncompiled(self, args, kwargs)
        return self.call_graph(args, kwargs)

    namespace = {
        "forward": forward,
        "model_class": model_class,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    return type(model_class.__name__, (GraphModel, _BareInit, model_class), namespace)


def build(tree: nn.Module, plan: Plan, make_plan: MakePlan) -> GraphModel:
    """The GraphModel around a module tree (which it takes over) and its first plan."""
    model_class = type(tree)
    return graph_class(model_class)(tree.__dict__, [plan], make_plan)


def _rebuild(
    model_class: type[nn.Module], attributes: dict[str, Any], plans: list[Plan], make_plan: MakePlan
) -> GraphModel:
    return graph_class(model_class)(attributes, plans, make_plan)
