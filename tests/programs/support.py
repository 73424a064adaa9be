"""Runs an everyday program on a model and on its optimised twin: same results, and graphs ran.

    compare(build("llama"), lambda model: model(ids, labels=ids))

The original is a deep copy made before: the twin shares the weights of the model it was made from.
Results are tensors, or nested containers of them; a program that trains returns its gradients or
losses. Where the results are equal but no graph ran, the failure is a ``NoGraph``.

The environment variable PROGRAMS_CHECK says how much is asked:

    graphs      results and graphs (the default)
    results     results alone
    originals   results alone, of the original twice: is the program itself sound?
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

import liger_fx
from liger_fx.errors import FallbackWarning
from liger_fx.model.block import Block
from liger_fx.modules.qk_norm_rotary import LigerQKNormRotaryEmbedding
from liger_fx.modules.rotary import LigerRotaryEmbedding
from tests.support.families import build, make_inputs

if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # before transformers 5.20

    def _enable(model: Any, activation_checkpointing_kwargs: Any = None) -> None:
        model.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    PreTrainedModel.activation_checkpointing_enable = _enable
    PreTrainedModel.activation_checkpointing_disable = (
        PreTrainedModel.gradient_checkpointing_disable
    )

# Both turn q and k of a layer, and nothing but a graph calls them.
ROTARY: tuple[type[Any], ...] = (LigerRotaryEmbedding, LigerQKNormRotaryEmbedding)
CHECK = os.environ.get("PROGRAMS_CHECK", "graphs")
assert CHECK in ("graphs", "results", "originals"), CHECK
RTOL, ATOL = 1e-4, 1e-5

Program = Callable[[Any], Any]

__all__ = [
    "CHECK",
    "NoGraph",
    "Witness",
    "build",
    "compare",
    "gradients",
    "graph_runs",
    "make_inputs",
    "optimize",
    "perturb",
    "run",
    "same",
    "train_step",
    "weights",
]


class NoGraph(AssertionError):
    """The program gave the right results, by the original forward: no graph ran, or too seldom."""


def optimize(model: nn.Module, inputs: Any = None, **options: Any) -> Any:
    """``liger_fx.optimize``, or a copy of the model where only the originals are looked at."""
    if CHECK == "originals":
        return copy.deepcopy(model)
    return liger_fx.optimize(model, inputs, **options)


@dataclass
class Witness:
    """What was seen of graphs: calls of rotary modules on real data, fallbacks in words, and of the
    blocks that have no blocks inside, the layers, how many calls a graph served or none did."""

    rotary_calls: int = 0
    fallbacks: list[str] = field(default_factory=list)
    layers_ran: int = 0
    layers_fell_back: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def count(self, arguments: tuple[Any, ...]) -> None:
        """Note a call of a rotary module, unless it is a trace's."""
        if any(isinstance(a, FakeTensor) for a in arguments):
            return
        with self._lock:
            self.rotary_calls += 1

    def count_layer(self, block: nn.Module, ran: int, fell_back: int) -> None:
        """Note a call of a block, if it is a layer."""
        if not any(isinstance(m, Block) for m in block.modules() if m is not block):
            with self._lock:
                self.layers_ran += ran
                self.layers_fell_back += fell_back


@contextmanager
def watching() -> Iterator[Witness]:
    """Counts while the block runs, in all threads. The classes themselves are watched: a hook, or
    a filter of warnings, would change what is looked at."""
    witness = Witness()
    begin = FallbackWarning.__init__
    call, fall_back = Block.call_graph, Block._run_original

    def counted(turn: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            witness.count((*args, *kwargs.values()))
            return turn(self, *args, **kwargs)

        return forward

    def init(self: Any, *args: Any) -> None:
        witness.fallbacks.append(str(args[0]) if args else "")
        begin(self, *args)

    def call_graph(self: Block, *args: Any) -> Any:
        witness.count_layer(self, 1, 0)
        return call(self, *args)

    def run_original(self: Block, *args: Any) -> Any:
        witness.count_layer(self, -1, 1)
        return fall_back(self, *args)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Block, "call_graph", call_graph))
        stack.enter_context(mock.patch.object(Block, "_run_original", run_original))
        for kind in ROTARY:
            stack.enter_context(mock.patch.object(kind, "forward", counted(kind.forward)))
        stack.enter_context(mock.patch.object(FallbackWarning, "__init__", init))
        yield witness


@contextmanager
def graph_runs(
    opt: nn.Module, calls: int = 1, *, rotary: int | None = None, quiet: bool = False
) -> Iterator[Witness]:
    """Fails with NoGraph at the end of the block unless every rotary module of ``opt`` was called
    ``calls`` times on average, which nothing but a graph does.

    In a model without a rotary module, there must be named modules, or at least graphs (in some no
    rule finds anything), every layer that is called must run one, and where a FallbackWarning is
    given for a model around them, layers must have run. With ``quiet`` none may be given in any
    model.
    rotary: how many rotary modules to expect, where ``opt`` does not hold the modules that run.
    """
    with watching() as witness:
        yield witness
    if CHECK == "graphs":
        _judge(witness, opt, calls, rotary, quiet)


def rotary_sites(opt: nn.Module) -> int:
    """How many modules of it turn q and k of a layer."""
    return sum(isinstance(module, ROTARY) for module in opt.modules())


def _judge(witness: Witness, opt: nn.Module, calls: int, rotary: int | None, quiet: bool) -> None:
    kinds = [type(m).__name__ for m in opt.modules()]
    sites = rotary_sites(opt) if rotary is None else rotary
    told = "; ".join(sorted(set(witness.fallbacks)))
    if sites:
        wanted = calls * sites
        if witness.rotary_calls < wanted:
            raise NoGraph(
                f"rotary modules were called {witness.rotary_calls} times, not {wanted} "
                f"({sites} sites, {calls} calls): {told or 'and nothing was said'}"
            )
    elif not any(k.startswith("Liger") for k in kinds) and not any(
        getattr(m, "plans", ()) for m in opt.modules()
    ):
        raise NoGraph(f"no named module is in it: {told or 'and nothing was said'}")
    if not sites and (witness.layers_fell_back or witness.layers_ran < bool(witness.fallbacks)):
        raise NoGraph(f"{witness.layers_ran} calls of layers ran graphs: {told}")
    if quiet and witness.fallbacks:
        raise NoGraph(told)


def run(program: Program, model: nn.Module, seed: int = 0) -> Any:
    """The program's result, its random numbers the same each time."""
    torch.manual_seed(seed)
    return program(model)


def compare(
    model: nn.Module,
    program: Program,
    *,
    inputs: Any = None,
    calls: int = 1,
    quiet: bool = False,
    rtol: float = RTOL,
    atol: float = ATOL,
    prepare: Callable[[Any], Any] = optimize,
) -> Any:
    """Asserts that ``program`` gives the same on ``model`` and on its optimised twin, and that
    graphs ran. Returns the twin.

    prepare: makes the twin of the model, where that is more than ``optimize(model, inputs)``.
    """
    original = copy.deepcopy(model)
    opt = optimize(model, inputs) if prepare is optimize else prepare(model)
    theirs = run(program, original)
    with graph_runs(opt, calls, quiet=quiet):
        same(run(program, opt), theirs, rtol=rtol, atol=atol)
    return opt


def same(
    ours: Any, theirs: Any, path: str = "result", *, rtol: float = RTOL, atol: float = ATOL
) -> None:
    """Asserts equal types, fields and values, floating ones to rounding."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), f"{path} is a {type(ours).__name__}"
        assert ours.requires_grad == theirs.requires_grad, f"{path}.requires_grad"
        torch.testing.assert_close(
            ours.detach(),
            theirs.detach(),
            rtol=rtol if theirs.is_floating_point() else 0,
            atol=atol if theirs.is_floating_point() else 0,
            msg=lambda text: f"{path}: {text}",
        )
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= atol + rtol * abs(theirs), f"{path}: {ours} and {theirs}"
    elif isinstance(theirs, Mapping):  # every ModelOutput is one
        assert type(ours) is type(theirs), f"{path} is a {type(ours).__name__}"
        assert list(ours) == list(theirs), path
        for name in theirs:
            same(ours[name], theirs[name], f"{path}.{name}", rtol=rtol, atol=atol)
    elif isinstance(theirs, tuple | list):
        assert type(ours) is type(theirs), f"{path} is a {type(ours).__name__}"
        assert len(ours) == len(theirs), f"{path} has {len(ours)} of {len(theirs)}"
        for i, value in enumerate(theirs):
            same(ours[i], value, f"{path}[{i}]", rtol=rtol, atol=atol)
    elif hasattr(theirs, "self_attention_cache"):
        for name in ("self_attention_cache", "cross_attention_cache"):
            same(getattr(ours, name), getattr(theirs, name), f"{path}.{name}", rtol=rtol, atol=atol)
    elif hasattr(theirs, "layers") and hasattr(theirs, "get_seq_length"):  # a cache
        assert [type(x) for x in ours.layers] == [type(x) for x in theirs.layers], path
        for i, layer in enumerate(theirs.layers):
            if getattr(layer, "keys", None) is None:
                continue
            for name in ("keys", "values"):
                same(
                    getattr(ours.layers[i], name),
                    getattr(layer, name),
                    f"{path}.layers[{i}].{name}",
                    rtol=rtol,
                    atol=atol,
                )
    else:
        assert ours == theirs, f"{path}: {ours!r} and {theirs!r}"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together; a copy of any other."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient by the parameter's name; there must be one that is not zero."""
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    assert any(bool(g.any()) for g in found.values()), "no gradient at all"
    return found


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by name, as it is now."""
    return {name: whole(p) for name, p in model.named_parameters()}


def train_step(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and gradients of one forward and backward."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def perturb(model: nn.Module, seed: int = 0) -> Any:
    """Tame random weights, with norms and biases off their constant start; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.08)
            else:
                parameter.add_(noise * 0.05)
    return model.eval()
