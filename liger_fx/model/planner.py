"""How a kind of call of a block becomes a plan: traced, and rewritten by the rules that apply.

    planner.plan(block, call, examples)   ->   Plan: the graph, rewritten; its guards; its sites

One planner serves all blocks of a model. Alike blocks share what it makes.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from liger_fx.engine.counts import count_operators
from liger_fx.engine.rewriter import rewrite
from liger_fx.engine.rule import Selection, discover
from liger_fx.errors import LigerFxError, forget_frames
from liger_fx.model.alike import Alike, Transplant, describe, differing, places
from liger_fx.model.codec import encode_graph
from liger_fx.model.plan import Plan
from liger_fx.modules.origin import origins, turn_back
from liger_fx.report.blocks import FallbackRow
from liger_fx.report.facts import TreeRow
from liger_fx.report.verified import Verified
from liger_fx.tracing.call import (
    CallSpec,
    UnsupportedCall,
    flat_inputs,
    free_numbers,
    with_numbers_free,
    with_sizes_of,
)
from liger_fx.tracing.inner_blocks import NeedsPlan, NoPlan, examples_of
from liger_fx.tracing.members import entered_modules
from liger_fx.tracing.numbers import AsksNumber, another, plain
from liger_fx.tracing.retry import trace_block
from liger_fx.tracing.trace import Result, Trace
from liger_fx.tracing.tracer import Plans
from liger_fx.tracing.walk import module_at, modules_by_path

# Each kind of call costs a trace and a graph; a block called in more ways than this has a
# plain argument that changes at every call.
MAX_PLANS = 16
_NO_PROMISE = "the model's code asks of these sizes what no graph can promise"


# Plans of groups whose blocks were found alike in the trace that goes on, but for the modes of
# their modules: with those of the block that each was made for.
Served = dict[tuple[Alike, Plan], list[bool]]


class NotNow(UnsupportedCall):
    """A call that may have a plan at another time."""


class Planner:
    """Makes the plans of one model's blocks; ``selection`` says what is rewritten, None that
    nothing is. ``fallbacks`` are the calls that no graph served; ``original`` is the tree of the
    given model, ``verified`` what verify found, for the report."""

    def __init__(self, selection: Selection | None) -> None:
        self.selection = selection
        self.original: tuple[TreeRow, ...] = ()
        self.verified: Verified | None = None
        self.fallbacks: list[FallbackRow] = []
        self.lock = threading.RLock()
        self._alike: list[Alike] = []

    # -- which blocks are alike -------------------------------------------------------------------

    def group(self, blocks: Mapping[str, Any]) -> None:
        """Let blocks of one class, by path, be taken for alike until one of them is asked for a
        plan; not the root."""
        made: dict[Hashable, Alike] = {}
        for path, block in blocks.items():
            kind = block.block_class if path else path
            alike = made.setdefault(kind, Alike(None, ()))
            alike.add(block)
            block._block.alike = alike
        self._alike += made.values()

    def _key(self, path: str, block: nn.Module) -> tuple[Hashable, dict[str, int]]:
        key, ints = describe(block)
        return (key, self._chosen_in(path, block)), ints

    def _chosen_in(self, path: str, block: nn.Module) -> Hashable:
        """What the selection says of each module of the block: alike blocks are chosen alike."""
        selection = self.selection
        if selection is None or not (selection.excluded or selection.chosen):
            return None
        names = [rule.name for rule in discover()]
        below = selection.below(path)
        return tuple(
            below.refusal(name, inner) is None for inner in places(block) for name in names
        )

    def regroup(self, block: Any) -> None:
        """Let the blocks alike to one that was changed share plans with those that they are like
        now; where all were changed likewise, they stay together."""
        alike: Alike = block._block.alike
        if len(alike.members) < 2:
            return
        described = [(member, *self._key(member._block.path, member)) for member in alike.members]
        if not any(alike.is_like(key, ints) for _, key, ints in described):
            (alike.key, _), *_ = Counter(key for _, key, _ in described).most_common()
            like = [ints for _, key, ints in described if key == alike.key]
            if not alike.plans:
                alike.attributes = differing(like)
            alike.ints = alike.shared(like[0])
        for member, key, ints in described:
            if alike.is_like(key, ints):
                continue
            alike.remove(member)
            found = next((other for other in self._alike if other.is_like(key, ints)), None)
            if found is None:
                found = self._new_group(alike, key, [i for _, k, i in described if k == key])
            found.add(member)
            member._block.alike = found
            member._block.start_anew()

    def turn_back(self, alike: Alike) -> None:
        """Where the code that a plan replaced reads something else in Python now, or is another,
        let the modules that were replaced stand there again."""
        for plan in alike.plans:
            if plan.reads_alike():
                continue
            for named in (named for member in alike.members for named in plan.named_in(member)):
                if origins(named):
                    turn_back(named)

    def _new_group(self, old: Alike, key: Hashable, ints: list[dict[str, int]]) -> Alike:
        """For blocks of that key and these ints, who were alike to others."""
        known = tuple(path for path in old.attributes if path in ints[0])
        found = Alike(key, known if old.plans else differing(ints))
        found.ints = found.shared(ints[0])
        # Each plan checks what it needs: a change may not touch that.
        found.plans, found.rewritten = list(old.plans), old.rewritten
        self._alike.append(found)
        return found

    def know(self, alike: Alike) -> None:
        """Count in the group of a block that was copied."""
        if alike not in self._alike:
            self._alike.append(alike)

    def part(self, block: Any, edited: Plan) -> None:
        """Let a block go its own way, with another plan in the place of its first."""
        alike: Alike = block._block.alike
        own = Alike(object(), alike.attributes)
        own.ints, own.rewritten = dict(alike.ints), alike.rewritten
        first = next(p for p in alike.plans if p.guards.holds_for_attributes(block))
        own.plans = [edited if plan is first else plan for plan in alike.plans]
        alike.remove(block)
        own.add(block)
        self._alike.append(own)
        block._block.alike = own
        block._block.start_anew()
        for other in self._alike:  # graphs that call it go on to
            for around in other.members:
                around._block.start_anew()
                there = modules_by_path(around)
                for plan in other.plans:
                    at = [p for p in plan.called if there.get(p) is block]
                    plan.called = {**plan.called, **dict.fromkeys(at, own)}

    def _split(self, alike: Alike, block: Any, plan: Plan) -> None:
        """The code of ``block`` asks for ints that the others do not all share: those that hold
        others part from it."""
        asked = plan.guards.attributes.values()
        others = [m for m in alike.members if not plan.guards.holds_for_attributes(m)]
        alike.attributes = tuple(p for p in alike.attributes if p not in asked)
        alike.ints = {**alike.ints, **{path: int_at(block, path) for path in asked}}
        for member in others:
            alike.remove(member)
            ints = {**alike.ints, **{path: int_at(member, path) for path in asked}}
            found = next((o for o in self._alike if o.key == alike.key and o.ints == ints), None)
            if found is None:
                found = Alike(alike.key, alike.attributes)
                found.ints, found.plans = ints, list(alike.plans)
                self._alike.append(found)
            found.add(member)
            member._block.alike = found
            member._block.start_anew()

    # -- plans ------------------------------------------------------------------------------------

    def plan(
        self,
        block: Any,
        call: CallSpec,
        examples: Mapping[str, Any] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[int, Plan]:
        """A plan for this kind of call of ``block``, made if there is none yet, and its number.
        ``exact`` traces it at the very sizes of the call.

        TraceError for what cannot be put into a graph, UnsupportedCall for too many kinds of calls.
        """
        if block._block.alike.key is None:  # whom it is like was not looked at yet
            self.regroup(block)
        alike: Alike = block._block.alike
        for number, plan in enumerate(alike.plans):
            if _serves(plan, block, call, examples) and plan.result is not None:
                return number, plan
        if len(alike.plans) >= MAX_PLANS:
            names = ", ".join(sorted(call.arguments))
            raise UnsupportedCall(
                f"it is called in more than {MAX_PLANS} ways, this time with {names}"
            )
        traced = self.traced(block, call, examples, exact=exact)
        for number, plan in enumerate(alike.plans):
            if (
                plan.result is None  # loaded, or copied
                and plan.guards == traced.guards
                and block._block.holds(plan, block)
            ):
                plan.result = traced.result
                return number, plan
        before = places(block) if len(alike.members) > 1 else {}
        plan = self._rewritten(block, traced)
        if plan.guards.attributes:
            self._split(alike, block, plan)
        if len(alike.members) > 1:
            self._transplant(alike, block, before)
        plan.settle(block)
        alike.plans.append(plan)
        return len(alike.plans) - 1, plan

    def _transplant(self, alike: Alike, block: Any, before: dict[str, nn.Module]) -> None:
        """Give the others of the group what was put into ``block``."""
        transplant = Transplant(block, before)
        if not transplant.new:
            return
        for other in alike.members:
            if other is not block:
                transplant.onto(other)
        alike.key, ints = self._key(block._block.path, block)
        alike.ints = alike.shared(ints)
        for member in alike.members:  # earlier plans look at what is there now
            member._block.start_anew()

    def _rewritten(self, block: Any, trace: Trace) -> Plan:
        """NotNow where named modules would have to be made around parameters that are stand-ins:
        they would keep them."""
        if self.selection is None:
            return Plan(trace)
        operators = count_operators(trace.graph, block)
        selection = self.selection.below(block._block.path)
        if _holds_its_own(block):
            return Plan(trace, tuple(rewrite(trace, discover(), selection).sites), operators)
        before = places(block)
        try:
            rewriting = rewrite(trace, discover(), selection)
        except AttributeError:  # what should be a parameter is none
            rewriting = None
        made = Transplant(block, before)
        if rewriting is None or made.new:
            made.undo(block)
            raise NotNow(
                "at its first call its parameters were stand-ins (torch.func, torch.export)"
            )
        return Plan(trace, tuple(rewriting.sites), operators)

    def traced(
        self,
        block: Any,
        call: CallSpec,
        examples: Mapping[str, Any] | None = None,
        *,
        exact: bool = False,
    ) -> Trace:
        """The trace of a call, not rewritten; blocks inside get the plans that it needs."""
        ints = {path: int_at(block, path) for path in block._block.alike.attributes}
        made: Served = {}
        result_of = functools.partial(self._result_of, made=made)
        plans = Plans(of=result_of, attributes=ints, exact=exact)
        forward = block.block_class.forward
        numbers = free_numbers(call)

        def trace(given: Mapping[str, Any] | None) -> Trace:
            while isinstance(
                found := _trace(block, call, forward, plans=plans, examples=given), NeedsPlan
            ):
                self._plan_inside(found, made)
            return found

        found = trace(examples)
        if numbers and examples:
            others = {name: another(plain(examples[name])) for name in numbers}
            if encode_graph(trace({**examples, **others}).graph) != encode_graph(found.graph):
                raise AsksNumber
        return found

    def _plan_inside(self, needed: NeedsPlan, made: Served) -> None:
        """Make a plan for a block that a trace met, and note in ``made`` whom it serves."""
        block, first = needed.block, None
        self.turn_back(block._block.alike)
        self.regroup(block)
        for exact in (False, True):
            try:
                self.plan(block, needed.call, needed.examples, exact=exact)
            except NotNow:
                raise
            except (LigerFxError, UnsupportedCall) as error:
                forget_frames(error)
                first = first or error
                continue
            found = self._result_of(block, needed.call, needed.examples, {})
            if found is not None:
                alike = block._block.alike
                made[alike, alike.plans[found[0]]] = _modes(block)
                return
        first = first or UnsupportedCall(_NO_PROMISE)
        block._block.failed.append((needed.call, first))

    def _result_of(
        self,
        block: Any,
        call: CallSpec,
        examples: Mapping[str, Any],
        made: Served,
    ) -> tuple[int, Result] | None:
        """The number of the plan that serves this call of a block inside, and what it returns."""
        for failed, reason in block._block.failed:
            if failed == call:
                raise NoPlan(reason)
        alike: Alike = block._block.alike
        for number, plan in enumerate(alike.plans):
            modes = made.get((alike, plan))
            is_like = modes is not None and modes == _modes(block)
            if plan.result is not None and _serves(plan, block, call, examples, is_like):
                return number, plan.result
        return None

    def plan_for(
        self, block: Any, call: CallSpec, arguments: Mapping[str, Any], examples: Any
    ) -> Plan:
        """A plan that serves this very call, traced at example sizes, or else at the call's own."""
        plan = self._with_numbers_free(block, call, arguments)
        if plan is not None:
            return plan
        tries = ((call, False), (with_sizes_of(call, arguments), True))
        first: Exception | None = None
        for candidate, exact in tries:
            try:
                _, plan = self.plan(block, candidate, examples, exact=exact)
            except (LigerFxError, UnsupportedCall) as error:
                first = first or error
                continue
            if plan.take(block, arguments) is not None:
                return plan
        if first is not None:
            raise first
        raise UnsupportedCall(_NO_PROMISE)

    def _with_numbers_free(
        self, block: Any, call: CallSpec, arguments: Mapping[str, Any]
    ) -> Plan | None:
        """A plan for any numbers, in the place of one for such a call but for its numbers."""
        alike: Alike = block._block.alike
        for number, old in enumerate(alike.plans):
            freed = with_numbers_free(call, old.guards.call)
            if freed is None or freed.arguments == old.guards.call.arguments:
                continue
            if freed in alike.asking:
                continue
            if not _serves(old, block, old.guards.call):
                continue
            values = flat_inputs(freed.arguments, arguments)
            try:
                place, plan = self.plan(block, freed, examples_of(freed, values))
            except (AsksNumber, LigerFxError, UnsupportedCall):
                alike.asking.append(freed)
                return None
            if place != number:
                del alike.plans[place]
                alike.plans[number] = plan
                for member in alike.members:
                    member._block.start_anew()
            return plan if plan.take(block, arguments) is not None else None
        return None

    def note(self, fallback: FallbackRow) -> bool:
        """Keep a fallback for the report; whether it is a new one."""
        if fallback in self.fallbacks:
            return False
        self.fallbacks.append(fallback)
        return True

    def __getstate__(self) -> dict[str, Any]:
        kept = ("selection", "original", "verified", "fallbacks")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["selection"])  # type: ignore[misc]
        self.__dict__.update(state)


def _holds_its_own(block: nn.Module) -> bool:
    return all(
        p is None or isinstance(p, nn.Parameter) and not isinstance(p, FakeTensor)
        for module in entered_modules(block).values()
        for p in module._parameters.values()
    )


def _trace(*args: Any, **kwargs: Any) -> Trace | NeedsPlan:
    try:
        return trace_block(*args, **kwargs)
    except NeedsPlan as needed:
        forget_frames(needed)
        return needed


def _modes(block: nn.Module) -> list[bool]:
    return [module.training for module in modules_by_path(block).values()]


def _serves(
    plan: Plan,
    block: Any,
    call: CallSpec,
    examples: Mapping[str, Any] | None = None,
    is_like: bool = False,
) -> bool:
    """is_like: whether the block is known to be as the one that the plan was made for."""
    guards = plan.guards
    return (
        guards.call.arguments == call.arguments
        and guards.sizes_hold(call.hints)
        and guards.holds_for_attributes(block)
        and guards.reads_hold(block, examples or {})
        and (is_like or block._block.holds(plan, block))
    )


def int_at(block: nn.Module, path: str) -> int:
    """The int that a module of the block holds."""
    owner, _, name = path.rpartition(".")
    value: int = vars(module_at(block, owner))[name]
    return value
