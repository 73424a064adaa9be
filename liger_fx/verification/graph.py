"""The graphs of an optimised model under verification: do they serve the calls, and their sites?

Block, calls   ->   a check of each named module; faults; what was not looked at, as remarks
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from liger_fx.errors import LigerFxError
from liger_fx.model.account import blocks_of
from liger_fx.model.block import Block
from liger_fx.model.build import build
from liger_fx.model.plan import Plan
from liger_fx.model.planner import Planner
from liger_fx.tracing.call import UnsupportedCall, flat_inputs, named_arguments
from liger_fx.tracing.fakes import tensors_in
from liger_fx.tracing.inner_blocks import examples_of
from liger_fx.verification.calls import Call, called_as
from liger_fx.verification.sites import SiteCheck, SiteChecks

Arguments = dict[str, Any]


@dataclass
class GraphCheck:
    """The sites, what is wrong apart from them, and what could not be looked at."""

    sites: list[SiteCheck] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_graph(model: nn.Module, opt: nn.Module, calls: Sequence[Call]) -> GraphCheck:
    """The sites of `opt`, on every call of a block that a graph of it serves, in the call's modes.

    A model that is no Block has no graph to check: nothing is found and nothing noted.
    """
    found = GraphCheck()
    if not isinstance(opt, Block):
        return found
    blocks = blocks_of(opt)
    plain = build(model, blocks, Planner(None))
    checks, failed, seen = SiteChecks(model, opt), set[int](), set[int]()
    checker = _Checker(model, opt, plain, checks)
    for call in calls:
        with called_as(call, plain, opt):
            served = _served(opt, _arrivals(plain, blocks, call))
            if not served:
                names = ", ".join(call.named(opt.block_class.forward) or {}) or "these inputs"
                found.faults.append(
                    f"no graph serves a call with {names}, so nothing was verified by it"
                )
            for path, plan, arguments in served:
                seen.add(id(plan))
                if id(plan) in failed or not (_has_sites(plan) or plan is not _first(opt, path)):
                    continue
                try:
                    checker.check(path, plan, arguments)
                except (LookupError, LigerFxError, UnsupportedCall) as mismatch:
                    failed.add(id(plan))
                    if plan is _first(opt, path):
                        where = path or "the model"
                        found.faults.append(
                            f"no site of {where} was checked: the graph is not the model's, "
                            f"{mismatch}"
                        )
    found.sites = checks.judged()
    checked = {check.path for check in found.sites}
    for path, block in blocks.items():
        for plan in block.plans:
            if id(plan) not in seen and not _named_modules(plan, path) <= checked:
                seen.add(id(plan))
                names = ", ".join(plan.guards.call.arguments)
                where = f"{path or 'the model'}'s graph for {names}"
                found.remarks.append(f"{where} was not run: it holds for no call made here")
    return found


def _first(opt: Block, path: str) -> Plan:
    """The graph that was made of the block as it was given, whether it is used any more or not."""
    block: Any = opt.get_submodule(path)
    plans: list[Plan] = block._block.alike.plans
    return next(plan for plan in plans if plan.guards.holds_for_attributes(block))


def _has_sites(plan: Plan) -> bool:
    return bool(_named_modules(plan, ""))


def _named_modules(plan: Plan, path: str) -> set[str]:
    """The paths of the named modules that the graph calls."""
    modules = (n for n in plan.graph.find_nodes(op="call_module") if "plan" not in n.meta)
    targets = {str(n.target) for n in modules if "rewrite" in n.meta} | {
        site.after.removeprefix("call_module ") for site in plan.sites if site.after
    }
    return {f"{path}.{target}".lstrip(".") for target in targets}


def _arrivals(plain: Block, paths: Any, call: Call) -> list[tuple[str, Arguments]]:
    """What each block is called with in a call of the model, as the plain blocks compute it."""
    found: list[tuple[str, Arguments]] = []
    handles = []
    for path in paths:
        block: Any = plain.get_submodule(path)

        def note(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
            try:
                arguments = named_arguments(module.block_class.forward, args, kwargs)
            except UnsupportedCall:
                return
            found.append((path, _kept(arguments)))

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        plain(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kept(arguments: Arguments) -> Arguments:
    """The arguments as they are now: a cache will be written to."""
    return pytree.tree_map(_as_now, arguments)


def _as_now(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    tensors = {id(t): t.detach().clone() for t in tensors_in(value)}
    return copy.deepcopy(value, dict(tensors))


def _served(opt: Block, arrivals: list[tuple[str, Arguments]]) -> list[tuple[str, Plan, Arguments]]:
    found = []
    for path, arguments in arrivals:
        block: Any = opt.get_submodule(path)
        plan = block.serving(arguments)
        if plan is not None:
            found.append((path, plan, arguments))
    return found


class _Checker:
    """Checks the sites of plans on the arguments of calls."""

    def __init__(self, model: nn.Module, opt: Block, plain: Block, checks: SiteChecks) -> None:
        self.model, self.opt, self.plain, self.checks = model, opt, plain, checks
        self._anew: dict[int, fx.Graph] = {}

    def check(self, path: str, plan: Plan, arguments: Arguments) -> None:
        """The sites of one plan on one call's arguments."""
        call = plan.guards.call
        examples = examples_of(call, flat_inputs(call.arguments, arguments))
        examples = {name: _as_now(value) for name, value in examples.items()}
        plain: Any = self.plain.get_submodule(path)
        _, before = plain._block.planner.plan(plain, call, examples)
        # An equal call may have named its arguments in another order.
        inputs = tuple(flat_inputs(before.guards.call.arguments, arguments))
        after = plan.graph
        if plan is not _first(self.opt, path):
            after = self._rewritten_anew(path, plan, examples)
        prefix = f"{path}." if path else ""
        self.checks.run(plain, before.graph, after, prefix, [inputs])

    def _rewritten_anew(self, path: str, plan: Plan, examples: dict[str, Any]) -> fx.Graph:
        """A later plan was made of a tree with named modules in it: what it would be without."""
        if id(plan) not in self._anew:
            selection = self.opt._block.planner.selection
            root = build(self.model, blocks_of(self.opt), Planner(selection))
            block: Any = root.get_submodule(path).train(plan.guards.training)
            _, made = root._block.planner.plan(block, plan.guards.call, examples)
            self._anew[id(plan)] = made.graph
        return self._anew[id(plan)]
