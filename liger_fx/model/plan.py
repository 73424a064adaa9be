"""One traced and rewritten graph of a block, the kind of call it serves, and the check that a call
is one.

input_ids int64[batch, sequence], eval mode, no autocast  ->  this graph
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from liger_fx.engine.site import Site
from liger_fx.errors import UsageError
from liger_fx.model.codec import decode_graph, encode_graph
from liger_fx.model.direct import compile_direct
from liger_fx.modules.origin import NamedModule, origins
from liger_fx.tracing.check import Check
from liger_fx.tracing.effects import is_region_boundary
from liger_fx.tracing.guards import Guards, Take, compile_take
from liger_fx.tracing.leaf_modules import is_leaf
from liger_fx.tracing.reads import Attributes, Surroundings
from liger_fx.tracing.trace import OpaqueLeaf, Result, Trace
from liger_fx.tracing.tree_state import (
    Kind,
    ModuleFacts,
    Modules,
    Tree,
    TreeFacts,
    add_facts,
    add_state,
    places_of,
)
from liger_fx.tracing.walk import module_at

Operators = dict[str, int]
_DERIVED = ("function", "inner", "_places")  # made when they are first asked for


class Plan:
    """A graph that serves one kind of call of alike blocks.

    sites: what the rules rewrote and refused, paths below the block; nothing for a plain trace.
    operators: how often each operator stood in the graph before it was rewritten.
    result: what the graph returns, for the traces of blocks around; None if it was loaded.
    called: the alike ones that each block belongs to that the graph calls, by path; where the plan
        is one block's alone.
    """

    called: Mapping[str, Any] = {}

    def __init__(self, trace: Trace, sites: tuple[Site, ...] = (), before: Operators | None = None):
        self.graph: fx.Graph = trace.graph
        self.guards: Guards = trace.guards
        self.opaque: list[OpaqueLeaf] = trace.opaque
        self.paths = sorted({call.path for call in trace.calls})
        self.result: Result | None = trace.result
        self.read: Mapping[str, tuple[str, ...]] = trace.read
        self.sites, self.operators = sites, before
        self.assume(trace.root)
        self._prepare()

    @classmethod
    def restored(
        cls,
        graph: fx.Graph,
        guards: Guards,
        opaque: list[OpaqueLeaf],
        paths: list[str],
        read: Mapping[str, tuple[str, ...]],
        sites: tuple[Site, ...],
        operators: Operators | None,
    ) -> Plan:
        """A plan from its parts; it holds for no call before ``assume``."""
        plan = cls.__new__(cls)
        plan.graph, plan.guards, plan.opaque = graph, guards, opaque
        plan.paths, plan.sites, plan.operators, plan.result = paths, sites, operators, None
        plan.read = read
        plan._prepare()
        return plan

    def assume(self, block: nn.Module, kinds: Mapping[str, Kind] | None = None) -> None:
        """Take the tree as it is now for the one the graph was made for, but for the dtypes and
        devices in ``kinds``, if given."""
        there = _modules_at(block, self.paths)
        followed = {path: m for path, m in there.items() if not is_leaf(m)}
        followed |= self._taken_apart(block)
        called = _modules_at(block, self._called_paths)
        facts = TreeFacts.of(block, followed, called)
        if kinds is not None:
            facts = replace(facts, kinds={path: kinds[path] for path in facts.kinds})
        self.facts = facts
        self.members = ModuleFacts.of(followed)
        self.attributes = Attributes(block, self.read)
        self.surroundings: Surroundings | None = self._surroundings(block)
        self._forget()

    def _taken_apart(self, block: nn.Module) -> Modules:
        """The leaf modules of whose parameters the graph computes what they would."""
        targets = (str(node.target) for node in self.graph.find_nodes(op="get_attr"))
        owners = dict.fromkeys(target.rpartition(".")[0] for target in targets)
        there = _modules_at(block, owners)
        return {path: m for path, m in there.items() if is_leaf(m) and m._parameters}

    def settle(self, block: Any) -> None:
        """Take the blocks inside as they are grouped now: what they return was taken from plans of
        theirs."""
        if len(block._block.alike.members) == 1:
            paths = [path for path, _ in self.inner]
            self.called = {path: module_at(block, path)._block.alike for path in paths}

    def stands(self, block: Any) -> bool:
        """Whether its code would find in Python what it found, and the blocks that the graph calls
        are there, grouped as they were, and the same is true of them."""
        check = Check()
        self._add_read(check, [block])
        there = {path: module_at(block, path) for path, _ in self.inner}
        return (
            check.compiled()()
            and all(_alike_of(there[path]) is alike for path, alike in self.called.items())
            and all(_serves_in(there[path], number) for path, number in self.inner)
        )

    def fits(self, block: nn.Module) -> bool:
        """Whether the dtypes, devices and configs of the tree are those the graph was made for, and
        its code would find in Python what it found."""
        check = Check()
        add_facts(check, self._tree(block))
        self._add_read(check, [block])
        return check.compiled()()

    def _add_read(self, check: Check, blocks: list[nn.Module]) -> None:
        """Add that the code of these blocks would find in Python what it found."""
        for block in blocks:
            self.attributes.add_to(check, block)
        if self.surroundings is None:  # it was pickled
            self.surroundings = self._surroundings(blocks[0])
        self.surroundings.add_to(check)

    def _surroundings(self, block: nn.Module) -> Surroundings:
        """What the code that the graph replaces finds in Python: that of named modules, too."""
        return Surroundings(self.followed_modules(block).values(), self.replaced_in(block))

    def replaced_in(self, block: nn.Module) -> list[type[nn.Module]]:
        """The classes of what the named modules of a block stand for."""
        found = (origin.cls for named in self.named_in(block) for origin in origins(named))
        return list(dict.fromkeys(found))

    def reads_alike(self) -> bool:
        """Whether the code that the graph replaces is as it was, and what it finds outside."""
        return self.surroundings is None or self.surroundings.stand()

    def named_in(self, block: nn.Module) -> list[nn.Module]:
        """The named modules that the graph calls in a block."""
        called = _modules_at(block, self._called_paths).values()
        return [module for module in called if isinstance(module, NamedModule)]

    def _tree(self, block: nn.Module) -> Tree:
        modules = self.followed_modules(block)
        return Tree.of(block, modules, self.facts, self.guards, self._places, self.members)

    @property
    def _called_paths(self) -> list[str]:
        """The paths of the modules that the graph calls as they are, blocks aside."""
        nodes = self.graph.find_nodes(op="call_module")
        return sorted({str(n.target) for n in nodes if "plan" not in n.meta})

    @functools.cached_property
    def _places(self) -> list[str]:
        called = (path for path, _ in self.inner)
        return places_of((*self.facts.classes, *called))

    def add_states(self, check: Check, block: Any) -> None:
        """Add that the block is as the graph assumes: its modes, hooks, dtypes, devices and
        configs; and so are the models inside it, whose results depend on that.

        (What a layer returns depends on what the graph around it checks as well, dtypes, configs,
        and on what its code reads in Python.)
        """
        add_state(check, self._tree(block))
        read: dict[Plan, list[nn.Module]] = {self: [block]}
        for path, number in self.inner:
            alike = _alike_of(inner := module_at(block, path))
            if alike is None or number >= len(alike.plans):  # gone, which the state above tells
                continue
            if len(alike.members) == 1:
                alike.plans[number].add_states(check, inner)
            else:
                read.setdefault(alike.plans[number], []).append(inner)
        for plan, blocks in read.items():
            plan._add_read(check, blocks)

    @property
    def modules(self) -> set[str]:
        """The paths of all that the graph calls."""
        return {str(node.target) for node in self.graph.find_nodes(op="call_module")}

    @functools.cached_property
    def inner(self) -> list[tuple[str, int]]:
        """The blocks that the graph calls, each by its path and the number of its plan."""
        nodes = self.graph.find_nodes(op="call_module")
        return [(str(n.target), n.meta["plan"]) for n in nodes if "plan" in n.meta]

    def _prepare(self) -> None:
        self.has_regions = any(map(is_region_boundary, self.graph.nodes))
        # The check of a call's arguments, which hands out the graph's inputs.
        self.take: Take = compile_take(self.guards)
        self.direct = compile_direct(self.graph)

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The graph as a Python function of the block and the inputs in order, for compilers."""
        return compile_graph(self.graph)

    def _forget(self) -> None:
        for name in _DERIVED:
            self.__dict__.pop(name, None)

    def explain(self, reasons: Mapping[tuple[str, str], str]) -> None:
        """Say in the report why sites, named by rule and path, were left alone."""
        self.sites = tuple(
            replace(s, reason=reasons.get((s.rule, s.path), s.reason)) for s in self.sites
        )

    def followed_modules(self, block: nn.Module) -> Modules:
        """The modules of a block whose code the graph replaces, by path."""
        return _modules_at(block, self.facts.classes)

    def run(self, block: Any, inputs: tuple[Any, ...]) -> Any:
        """The graph's result for inputs that ``take`` handed out.

        UsageError where modules that the graph names are no longer there.
        """
        try:
            # A profiler takes the modules' names from calls of them.
            function = self.function if torch.autograd._profiler_enabled() else self.direct
            if not self.has_regions:
                return function(block, *inputs)
            with _modes_restored(self.guards.autocast):
                return function(block, *inputs)
        except (AttributeError, KeyError) as error:
            missing = self._missing_path(block)
            if missing is None:
                raise
            path = ".".join(filter(None, (block._block.path, missing)))
            raise UsageError(
                f"{path} is gone: the module tree was changed after it was traced. Change the "
                "model that this one was made from, and optimise that again."
            ) from error

    def _missing_path(self, block: nn.Module) -> str | None:
        """A path that the graph names and the tree does not have, if any."""
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                try:
                    operator.attrgetter(node.target)(block)
                except AttributeError:
                    return str(node.target)
        return None

    def edited(self, graph: fx.Graph) -> Plan:
        """The same plan with another graph."""
        plan = Plan.__new__(Plan)
        plan.__dict__.update(self.__dict__, graph=graph)
        plan._forget()
        plan._prepare()
        return plan

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*_DERIVED, "take", "direct", "has_regions", "graph", "result")
        state = {k: v for k, v in self.__dict__.items() if k not in left_out}
        return {**state, "graph": encode_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=decode_graph(state["graph"]), result=None)
        self._prepare()


def _modules_at(root: nn.Module, paths: Iterable[str]) -> Modules:
    """Those of the modules that are there."""
    found = ((path, module_at(root, path)) for path in paths)
    return {path: module for path, module in found if module is not None}


def _serves_in(block: Any, number: int) -> bool:
    """Whether the plan of that number is one of the block as it is."""
    alike = _alike_of(block)
    return alike is not None and bool(block.has(alike.plans[number]))


def _alike_of(module: Any) -> Any:
    state = getattr(module, "_block", None)
    return None if state is None else state.alike


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a Python function of the module tree and the inputs in order."""
    code = graph.python_code(root_module="self")
    return fx.graph_module._forward_from_src(code.src, code.globals)


@contextmanager
def _modes_restored(autocast: Mapping[str, Any]) -> Iterator[None]:
    """A graph opens and closes its no_grad and autocast regions by single calls: close them on an
    error too."""
    grad_enabled = torch.is_grad_enabled()
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    states = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in autocast]
    try:
        yield
    except BaseException:
        torch._C._set_grad_enabled(grad_enabled)
        for device, enabled, dtype in states:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while torch.autocast_decrement_nesting() >= nesting:
            pass
        torch.autocast_increment_nesting()
        raise
