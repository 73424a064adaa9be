"""The graphs of an optimised model under verification: do they serve the calls, and their sites?

Block, calls   ->   a check of each named module; faults; what was not looked at, as remarks
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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
from liger_fx.tracing.call import CallSpec, UnsupportedCall, flat_inputs, named_arguments
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
                if id(plan) in failed or not _has_sites(plan):
                    continue
                try:
                    _check(checks, plain.get_submodule(path), path, plan, opt, arguments)
                except (LookupError, LigerFxError, UnsupportedCall) as mismatch:
                    failed.add(id(plan))
                    if plan is opt.get_submodule(path).plans[0]:  # type: ignore[index]
                        where = path or "the model"
                        found.faults.append(
                            f"no site of {where} was checked: the graph is not the model's, "
                            f"{mismatch}"
                        )
    found.sites = checks.judged()
    for path, block in blocks.items():
        for plan in block.plans:
            if _has_sites(plan) and id(plan) not in seen:
                seen.add(id(plan))
                names = ", ".join(plan.guards.call.arguments)
                where = f"{path or 'the model'}'s graph for {names}"
                found.remarks.append(f"{where} was not run: it holds for no call made here")
    return found


def _has_sites(plan: Plan) -> bool:
    return any("rewrite" in node.meta for node in plan.graph.nodes)


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
    tensors = {id(t): t.detach().clone() for t in _tensors_of(value) if isinstance(t, torch.Tensor)}
    return copy.deepcopy(value, dict(tensors))


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_of(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors_of(vars(value))


def _served(opt: Block, arrivals: list[tuple[str, Arguments]]) -> list[tuple[str, Plan, Arguments]]:
    found = []
    for path, arguments in arrivals:
        block: Any = opt.get_submodule(path)
        plan = block.serving(arguments)
        if plan is not None:
            found.append((path, plan, arguments))
    return found


def _check(
    checks: SiteChecks, plain: Any, path: str, plan: Plan, opt: Block, arguments: Arguments
) -> None:
    """The sites of one plan on one call's arguments."""
    call = plan.guards.call
    inputs = tuple(flat_inputs(call.arguments, arguments))
    graph = _graph_before(plain, plan, call, list(inputs), opt.get_submodule(path))
    prefix = f"{path}." if path else ""
    checks.run(plain, graph, plan.graph, prefix, [inputs])


def _graph_before(
    plain: Any, plan: Plan, call: CallSpec, inputs: list[Any], block: Any
) -> fx.Graph:
    """The graph before it was rewritten: of the plain block, for the first plan; a later one was
    made of a tree with named modules in it."""
    examples = {name: _as_now(value) for name, value in examples_of(call, inputs).items()}
    if plan is block.plans[0]:
        _, before = plain._block.planner.plan(plain, call, examples)
        return before.graph
    return block._block.planner.traced(block, call, examples).graph
