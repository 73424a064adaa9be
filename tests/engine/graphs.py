"""What the tests of the engine and of the rules share: a traced module, its rewrite, both run.

A tensor's dimension of size BATCH or TOKENS may vary in the trace, any other is fixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from liger_fx.engine.rewriter import rewrite
from liger_fx.engine.rule import Rule, Selection
from liger_fx.engine.site import Site
from liger_fx.engine.term import Term
from liger_fx.engine.terms import Terms
from liger_fx.tracing.call import CallSpec, InputSpec, Spec, named_arguments
from liger_fx.tracing.retry import trace_block
from liger_fx.tracing.trace import Trace

BATCH, TOKENS = 3, 5


class Formula(nn.Module):
    """A module that computes a function of its inputs and of its weights ``w`` and ``b``."""

    def __init__(self, function: Callable[..., Any], width: int = 8) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(width))
        self.b = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Around(nn.Module):
    """Another module as a child, ``inner``, with operations before and after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.sin()).cos()


def trace(module: nn.Module, *inputs: torch.Tensor) -> Trace:
    """The trace of ``module(*inputs)``."""
    named = {BATCH: "batch", TOKENS: "tokens"}
    specs: dict[str, Spec] = {
        name: InputSpec(tuple(named.get(n, n) for n in tensor.shape), tensor.dtype, tensor.device)
        for name, tensor in named_arguments(type(module).forward, inputs, {}).items()
    }
    return trace_block(module, CallSpec(specs, {name: size for size, name in named.items()}))


def term_of(function: Callable[..., Any], *inputs: torch.Tensor) -> Term:
    """The term of what a function of one tensor returns."""
    traced = trace(Formula(function), *(inputs or (rows(),)))
    view = Terms(traced.root)
    output = next(node for node in traced.graph.nodes if node.op == "output")
    return view(output.args[0])


def spell(term: Term, depth: int = 9) -> str:
    """A term in full: ``mul(x, rsqrt(v))``, attributes behind a semicolon."""
    if term.op == "constant":
        return f"{term.number:g}"
    if term.op == "opaque" or depth == 0:
        return str(term)
    if term.op == "get_attr":
        return str(term.attributes["path"])
    inside = [spell(operand, depth - 1) for operand in term.operands]
    inside += [f"{key}={value}" for key, value in term.attributes.items()]
    return f"{term.op}({', '.join(inside)})"


def rows(width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers of shape (BATCH, TOKENS, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, width, generator=generator).to(dtype)


@dataclass
class Rewritten:
    """A module before and after: the original runs as written, ``after`` runs the new graph."""

    before: nn.Module
    after: fx.GraphModule
    traced: Trace
    sites: list[Site]

    @property
    def done(self) -> list[Site]:
        """The sites that were rewritten."""
        return [site for site in self.sites if site.reason is None]

    @property
    def reasons(self) -> list[str]:
        """Why the others were not."""
        return [site.reason for site in self.sites if site.reason is not None]

    @property
    def code(self) -> str:
        """The new graph as one line a node, without the end."""
        lines = self.after.code.strip().split("\n")[1:]
        return "\n".join(line.split(";")[0].strip() for line in lines if "return" not in line)

    def called(self) -> list[str]:
        """Type names of the modules that the new graph calls, in order."""
        nodes = (node for node in self.traced.graph.nodes if node.op == "call_module")
        return [type(self.after.get_submodule(node.target)).__name__ for node in nodes]


def rewritten(
    rules: Iterable[Rule],
    module: nn.Module,
    *inputs: torch.Tensor,
    selection: Selection | None = None,
) -> Rewritten:
    """Trace a copy of the module, apply the rules, and keep both."""
    torch.manual_seed(0)
    traced = trace(copy.deepcopy(module), *inputs)
    keys = list(module.state_dict())
    sites = rewrite(traced, rules, selection).sites
    after = fx.GraphModule(traced.root, traced.graph)
    after.train(module.training)
    assert sorted(traced.root.state_dict()) == sorted(keys), "the keys of the state_dict changed"
    return Rewritten(module, after, traced, sites)


def differences(pair: Rewritten, *inputs: torch.Tensor) -> list[float]:
    """Relative L2 differences of the output and of the gradient of each input and parameter."""
    results = [_run(module, inputs) for module in (pair.before, pair.after)]
    (one, ours), (two, theirs) = results
    assert one.dtype == two.dtype and one.shape == two.shape
    assert ours.keys() == theirs.keys() and ours
    pairs = [(one, two), *((ours[name], theirs[name]) for name in ours)]
    return [float((a - b).double().norm() / a.double().norm()) for a, b in pairs]


def _run(
    module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    outputs = module(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    joined = torch.cat([out.flatten() for out in outputs])
    generator = torch.Generator().manual_seed(9)
    joined.backward(torch.randn(joined.shape, generator=generator).to(joined.dtype))
    gradients = {f"input {i}": x.grad for i, x in enumerate(leaves)}
    gradients |= {name: p.grad for name, p in module.named_parameters()}
    return joined.detach(), {n: g.clone() for n, g in gradients.items() if g is not None}
