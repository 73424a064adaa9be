"""One traced and rewritten graph of a model, the kind of call it serves, and the check that a call
is one.

input_ids int64[batch, sequence], eval mode, no autocast  ->  this graph
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from liger_fx.errors import UsageError
from liger_fx.graph_codec import decode_graph, encode_graph
from liger_fx.tracing.effects import is_region_boundary
from liger_fx.tracing.guards import Check, Guards
from liger_fx.tracing.leaf_modules import is_leaf
from liger_fx.tracing.trace import OpaqueLeaf, Trace
from liger_fx.tracing.tree_state import Kind, Modules, TreeFacts, TreeState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from liger_fx.engine.site import Site
    from liger_fx.report import GraphDiff
    from liger_fx.report.verified import Verified


class Plan:
    """A graph that serves one kind of call of a module tree, and the report of how it was
    rewritten."""

    def __init__(self, trace: Trace, report: GraphDiff | None = None) -> None:
        self.graph: fx.Graph = trace.graph
        self.guards: Guards = trace.guards
        self.opaque: list[OpaqueLeaf] = trace.opaque
        self.paths = sorted({call.path for call in trace.calls})
        self.report = report
        self.assume(trace.root)
        self._prepare()

    @classmethod
    def restored(
        cls,
        graph: fx.Graph,
        guards: Guards,
        opaque: list[OpaqueLeaf],
        paths: list[str],
        report: GraphDiff | None,
    ) -> Plan:
        """A plan from its parts; it holds for no call before ``assume``."""
        plan = cls.__new__(cls)
        plan.graph, plan.guards, plan.opaque = graph, guards, opaque
        plan.paths, plan.report = paths, report
        plan._prepare()
        return plan

    def assume(self, root: nn.Module, kinds: Mapping[str, Kind] | None = None) -> None:
        """Take the tree as it is now for the one the graph was made for, but for the dtypes and
        devices in ``kinds``, if given."""
        facts = TreeFacts.of(root, self._followed_modules(root))
        self.facts = facts if kinds is None else replace(facts, kinds=dict(kinds))

    def fits(self, root: nn.Module) -> bool:
        """Whether the dtypes, devices and configs of the tree are those the graph was made for."""
        guards, modules = self.guards, self._followed_modules(root)
        state = TreeState(root, modules, self.facts, guards.training, guards.attention_fixed)
        return state.is_as_traced()

    def _prepare(self) -> None:
        self.inputs = [str(n.target) for n in self.graph.nodes if n.op == "placeholder"]
        self._has_regions = any(map(is_region_boundary, self.graph.nodes))
        self._holds: Check | None = None
        self._function: Callable[..., Any] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """What the rules rewrote and refused; nothing for a plain trace."""
        return self.report.sites if self.report is not None else ()

    def explain(self, reasons: Mapping[tuple[str, str], str]) -> None:
        """Say in the report why sites, named by rule and path, were left alone."""
        if self.report is not None:
            sites = [replace(s, reason=reasons.get((s.rule, s.path), s.reason)) for s in self.sites]
            self.report = replace(self.report, sites=tuple(sites))

    def note(self, found: Verified) -> None:
        """Keep with the report what verify found."""
        if self.report is not None:
            self.report = self.report.with_verified(found)

    def holds(self, root: nn.Module, arguments: Mapping[str, Any]) -> bool:
        """Whether the guards hold for a call of ``root`` with these named arguments."""
        if self._holds is None:
            self._holds = self.guards.bind(root, self._followed_modules(root), self.facts)
        return self._holds(arguments)

    def _followed_modules(self, root: nn.Module) -> Modules:
        tree = dict(root.named_modules())
        return {path: tree[path] for path in self.paths if path in tree and not is_leaf(tree[path])}

    def run(self, root: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The graph's result for a call that ``holds``.

        UsageError where modules that the graph names are no longer there.
        """
        if self._function is None:
            self._function = compile_graph(self.graph)
        inputs = [arguments[name] for name in self.inputs]
        try:
            if not self._has_regions:
                return self._function(root, *inputs)
            with _modes_restored(self.guards.autocast):
                return self._function(root, *inputs)
        except AttributeError as error:
            missing = self._missing_path(root)
            if missing is None:
                raise
            raise UsageError(
                f"{missing} is gone: the module tree was changed after it was traced. Change the "
                "model that this one was made from, and optimise that again."
            ) from error

    def _missing_path(self, root: nn.Module) -> str | None:
        """A path that the graph names and the tree does not have, if any."""
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                try:
                    operator.attrgetter(node.target)(root)
                except AttributeError:
                    return str(node.target)
        return None

    def recompile(self, function: Callable[..., Any]) -> None:
        """Run ``function`` from now on: the graph was edited and compiled anew."""
        self._function = function

    def __getstate__(self) -> dict[str, Any]:
        state = {
            k: v for k, v in self.__dict__.items() if k not in ("_holds", "_function", "graph")
        }
        return {**state, "graph": encode_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=decode_graph(state["graph"]))
        self._prepare()


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
