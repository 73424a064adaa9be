"""A block: a torch.fx.GraphModule that is still the user's module, called as it was.

    LlamaDecoderLayer(hidden, position_embeddings=(cos, sin))   the graph traced for such a call
    the same with a mask                                        traced at its first use, then kept
    a call that no graph can serve                              the class's own forward, said once

Its class derives from GraphModule and from the module's own class, so ``isinstance``, ``config``,
``generate``, ``save_pretrained``, gradient checkpointing and the Trainer see what they know.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext

from liger_fx.errors import FallbackWarning, LigerFxError, UsageError, forget_frames
from liger_fx.model.account import report_of
from liger_fx.model.alike import Alike
from liger_fx.model.apart import apart, in_the_midst, of_plain_sizes
from liger_fx.model.codec import decode_graph, encode_graph
from liger_fx.model.compile_ahead import compile_ahead
from liger_fx.model.compiled import call_compiled
from liger_fx.model.decoding import Decoding, get_compiled_call
from liger_fx.model.decoding_mask import create_masks_for_generate
from liger_fx.model.interpreted import graph_to_interpret
from liger_fx.model.plan import Plan
from liger_fx.model.planner import NotNow, Planner
from liger_fx.report.blocks import FallbackRow
from liger_fx.report.graph_diff import GraphDiff
from liger_fx.tracing.call import (
    Signature,
    UnsupportedCall,
    flat_inputs,
    refuse_tensor_subclasses,
)
from liger_fx.tracing.check import Check
from liger_fx.tracing.inner_blocks import collected, collects_inside, examples_of
from liger_fx.tracing.naming import describe_call
from liger_fx.tracing.patches import is_tracing
from liger_fx.tracing.tree_state import GLOBAL_HOOKS
from liger_fx.tracing.walk import module_at


class _NoGraph(Exception):
    """No graph can serve a call; its text says why."""


class _Ready:
    """A plan with the check of one block: whether it, and this thread's modes, are as the plan
    assumes."""

    __slots__ = ("holds", "is_made", "plan", "run", "take")
    holds: Callable[[], bool]

    def __init__(self, plan: Plan, block: nn.Module) -> None:
        self.plan, self.take, self.run = plan, plan.take, plan.run
        self.holds = functools.partial(self._first, weakref.ref(block))
        self.is_made = False

    def _first(self, block: weakref.ref[nn.Module]) -> bool:
        """Checks take longer to make than to ask, and not all are asked."""
        self.holds, self.is_made = _compiled_check(self.plan, block()), True
        return self.holds()


class BlockState:
    """What a block holds besides its module: its path in the model, whom it is like, who makes its
    plans.

    states: the plans with this block's own checks, as far as they were needed.
    last: of these, what served the last call.
    failed: calls of outer traces that no plan could be made for, with the reason.
    own_graph: a plan that alike blocks share, and this block's copy of its graph, for edits.
    decoding: what its decoding steps run through, if it was asked for that.
    """

    def __init__(self, path: str, planner: Planner, alike: Alike) -> None:
        self.path, self.planner, self.alike = path, planner, alike
        self.states: list[_Ready] = []
        self.last: _Ready | None = None
        self.failed: list[tuple[Any, Exception]] = []
        self.own_graph: tuple[Plan, fx.Graph] | None = None
        self.meta: dict[str, Any] = {}
        self.decoding: Decoding | None = None

    def ready(self, block: Block) -> list[_Ready]:
        """Each plan, with the block's own check."""
        for plan in self.alike.plans[len(self.states) :]:
            self.states.append(_Ready(plan, block))
        return self.states

    def plans_here(self, block: Block) -> list[Plan]:
        """The plans that were made for blocks with its ints."""
        return [plan for plan in self.alike.plans if plan.guards.holds_for_attributes(block)]

    def start_anew(self) -> None:
        """Forget the checks: the block changed, or whom it is like."""
        self.states, self.last = [], None

    def holds(self, plan: Plan, block: Block) -> bool:
        """Whether the block and this thread's modes are as this plan of it assumes."""
        return next(ready for ready in self.ready(block) if ready.plan is plan).holds()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "planner": self.planner, "alike": self.alike}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


# Dynamo, where it gave up a block's call, tries to compile each function that the call runs.
@torch.compiler.disable
def _compiled_check(plan: Plan, block: Any) -> Callable[[], bool]:
    check = Check()
    plan.guards.add_modes(check)
    for path, alike in plan.called.items():
        if isinstance(inner := module_at(block, path), Block):
            check.add("{}.alike is {}", inner._block, alike)
    plan.add_states(check, block)
    return check.compiled()


class Block(fx.GraphModule):
    """What ``liger_fx.optimize`` makes of the root and of each block inside; subclasses also derive
    from the module's class, ``block_class``."""

    block_class: type[nn.Module]
    signature: Signature
    _block: BlockState
    # What GraphModule's own __init__ and recompile, which are never run, would set.
    _lineno_map = None
    _tracer_cls = None
    _tracer_extras: dict[str, Any] = {}
    shape_env = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module of the plain class: what ``type(opt).from_pretrained`` asks for."""
        return cls.block_class(*args, **kwargs)

    @property
    def kin(self) -> Alike | None:
        """What it shares with the blocks that it is like; None while nobody looked which they
        are."""
        alike = self._block.alike
        return None if alike.key is None else alike

    # -- the graph, as torch.fx shows it -----------------------------------------------------------

    @property
    def plans(self) -> list[Plan]:
        """A graph for each kind of call met so far; alike blocks share them."""
        return [plan for plan in self._block.plans_here(self) if self.has(plan)]

    def has(self, plan: Plan) -> bool:
        """Whether the plan is one of the block as it is."""
        # A check that was made tells it at once, of a plan without others inside.
        made = [one for one in self._block.states if one.plan is plan and one.is_made]
        return (bool(made) and not plan.inner and made[0].holds()) or plan.stands(self)

    @property
    def graph(self) -> fx.Graph:
        """The graph of the first kind of call. UsageError if the block was not called yet.

        To change it, edit it and call ``recompile()``: it serves the calls that it was traced for,
        in this block. Blocks alike keep theirs.
        """
        if (graph := graph_to_interpret(self)) is not None:
            return graph
        if not self.plans and TracingContext.try_get() is not None:
            return fx.Graph()  # Dynamo looks at its nodes, where the class's own forward runs, too
        state, plan = self._block, self._first_plan
        if len(state.alike.members) < 2:
            return plan.graph
        if state.own_graph is None or state.own_graph[0] is not plan:
            state.own_graph = plan, decode_graph(encode_graph(plan.graph))
        return state.own_graph[1]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._block.own_graph = self._first_plan, graph
        self.recompile()

    @property
    def _first_plan(self) -> Plan:
        plans = self.plans
        if not plans:
            where = self._block.path or "the model"
            raise UsageError(f"{where} has no graph: {self._why_none()}")
        return plans[0]

    @property
    def report(self) -> GraphDiff | None:
        """What was rewritten in all blocks from this one down, why the rest was not, and what no
        graph served; None for a plain trace."""
        return None if self._block.planner.selection is None else report_of(self)

    def _why_none(self) -> str:
        told = [f for f in self._block.planner.fallbacks if f.path == self._block.path]
        return (
            f"no call of it could be traced: {told[0].reason}" if told else "it was not called yet."
        )

    @property
    def code(self) -> str:
        """The Python code of ``.graph``."""
        plan, own = self._first_plan, self._block.own_graph
        graph = own[1] if own is not None and own[0] is plan else plan.graph
        return str(graph.python_code(root_module="self").src)

    @property
    def meta(self) -> dict[str, Any]:  # type: ignore[override]
        """GraphModule's notes."""
        return self._block.meta

    def recompile(self) -> Any:
        """Compile ``.graph`` anew, for this block, after it was edited."""
        state, graph = self._block, self.graph
        state.planner.part(self, self._first_plan.edited(graph))
        state.own_graph = None
        return graph.python_code(root_module="self")

    def __str__(self) -> str:
        """The module tree under the modules' true names; ``.code`` and ``.graph`` show the
        graph."""
        return nn.Module.__repr__(self)

    __repr__ = __str__

    # -- calls -------------------------------------------------------------------------------------

    def call_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph that serves this call; trace one if there is none, else the class's own
        forward."""
        state = self._block
        try:
            arguments = self.signature.named(args, kwargs)
        except UnsupportedCall as unsupported:
            return self._run_original(f"the call has {unsupported}", args, kwargs)
        keys = collected()
        if keys and collects_inside(self, keys):
            reason = f"{', '.join(keys)} of modules inside it are collected"
            return self._run_original(reason, args, kwargs)
        checkpointed = self.__dict__.get("gradient_checkpointing", False)
        # A checkpoint runs it now, and again for its backward.
        recomputed = checkpointed and self.training and torch.is_grad_enabled()
        if recomputed and collects_inside(self, None):
            reason = "it is checkpointed, and what is collected in it is so in its first run alone"
            return self._run_original(reason, args, kwargs)
        last = state.last  # what served before most often serves again
        if last is not None and (inputs := last.take(self, arguments)) is not None and last.holds():
            return last.run(self, inputs)
        for ready in state.ready(self):
            if (inputs := ready.take(self, arguments)) is not None and ready.holds():
                state.last = ready
                return ready.run(self, inputs)
        return self._first_call(arguments, args, kwargs)

    def plan_for_compiler(self, arguments: dict[str, Any]) -> Plan | None:
        """The plan that serves a call with fake tensors for its own; made if there is none, None if
        the class's own forward must run."""
        try:
            refuse_tensor_subclasses(arguments)
            return self.serving(arguments) or apart(lambda: self._new_plan(arguments))
        except (UnsupportedCall, _NoGraph) as reason:
            forget_frames(reason)
            self._tell(str(reason), arguments)
            return None

    def _first_call(self, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        try:
            refuse_tensor_subclasses(arguments)
            if in_the_midst():
                plan = apart(lambda: self._new_plan(of_plain_sizes(arguments)))
            else:
                plan = self._new_plan(arguments)
        except (UnsupportedCall, _NoGraph) as reason:
            forget_frames(reason)
            return self._run_original(str(reason), args, kwargs)
        inputs = plan.take(self, arguments)
        assert inputs is not None
        return plan.run(self, inputs)

    @torch.compiler.disable
    def _new_plan(self, arguments: dict[str, Any]) -> Plan:
        """A plan for a call that none served; _NoGraph says why there can be none."""
        state = self._block
        if any(GLOBAL_HOOKS):
            raise _NoGraph("a hook stands on all modules")
        with state.planner.lock:
            state.planner.turn_back(state.alike)
            known = state.alike.refusals.reason(self, arguments)
            if known is not None:
                raise _NoGraph(known)
            state.planner.regroup(self)
            state.start_anew()
            plan = self.serving(arguments)
            if plan is not None:
                return plan
            try:
                call = describe_call(self, arguments, inner=bool(state.path))
                values = flat_inputs(call.arguments, arguments)
                examples = examples_of(call, values)
                plan = state.planner.plan_for(self, call, arguments, examples)
                compile_ahead(self, plan, arguments)
                return plan
            except (UnsupportedCall, LigerFxError) as reason:
                if not isinstance(reason, NotNow):
                    state.alike.refusals.remember(self, arguments, str(reason))
                raise _NoGraph(reason) from reason

    def serving(self, arguments: dict[str, Any]) -> Plan | None:
        """The plan that serves a call with these named arguments in this thread's modes, if one
        does."""
        for ready in self._block.ready(self):
            if ready.take(self, arguments) is not None and ready.holds():
                return ready.plan
        return None

    def _run_original(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._tell(reason, (*self.signature.positional[: len(args)], *kwargs))
        return self.block_class.forward(self, *args, **kwargs)

    def _tell(self, reason: str, given: Iterable[str]) -> None:
        state, name = self._block, self.block_class.__name__
        reason = reason.rstrip(".")
        if state.planner.note(FallbackRow(state.path, name, ", ".join(given), reason)):
            where = f"{name} ({state.path})" if state.path else name
            warnings.warn(
                f"{where}: no graph serves this call, so its own forward runs, with the named "
                f"modules in place: {reason}.",
                FallbackWarning,
                stacklevel=7,
            )

    # -- copies ------------------------------------------------------------------------------------

    @property
    def __deepcopy__(self) -> Any:
        """None: ``__reduce__`` does. (GraphModule has one, which a wrapper that hands attributes
        on, a model of PEFT, would take for its own.)"""
        raise AttributeError("__deepcopy__")

    def __copy__(self) -> Block:
        twin = bare_block(self.block_class)
        state = self._block
        twin.__setstate__({**self.__dict__, "_block": BlockState(**state.__getstate__())})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return bare_block, (self.block_class,), self.__dict__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._block.alike.add(self)
        self._block.planner.know(self._block.alike)


def bare_block(block_class: type[nn.Module]) -> Any:
    """A block of that class without any attributes."""
    return object.__new__(graph_class(block_class))


def graph_class(block_class: type[nn.Module]) -> type[Block]:
    """The Block class that is also a ``block_class``, under its name and with its forward's
    signature; one for each class."""
    found = _GRAPH_CLASSES.get(block_class)
    if found is None:
        found = _GRAPH_CLASSES[block_class] = _derive(block_class)
    return found


_GRAPH_CLASSES: weakref.WeakValueDictionary[type, type[Block]] = weakref.WeakValueDictionary()


def _derive(block_class: type[nn.Module]) -> type[Block]:
    def forward(self: Block, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return call_compiled(self, args, kwargs)
        if is_tracing():
            return block_class.forward(self, *args, **kwargs)
        return self.call_graph(args, kwargs)

    # No __wrapped__: accelerate's unwrap_model would follow it past the graphs.
    kind: Any = forward
    kind.__signature__ = inspect.signature(block_class.forward)
    kind.__doc__ = block_class.forward.__doc__
    kind.__qualname__ = f"{block_class.__qualname__}.forward"
    namespace = {
        "forward": forward,
        "block_class": block_class,
        "signature": Signature.of(block_class.forward),
        "__module__": block_class.__module__,
        "__qualname__": block_class.__qualname__,
        "__doc__": block_class.__doc__,
    }
    if hasattr(block_class, "get_compiled_call"):
        namespace["get_compiled_call"] = get_compiled_call
        if not hasattr(block_class, "create_masks_for_generate"):
            namespace["create_masks_for_generate"] = staticmethod(create_masks_for_generate)
    return type(block_class.__name__, (Block, block_class), namespace)
