"""Each named module against the nodes it replaced, on the tensors that really arrive there.

    model.layers.0.mlp:  down(act(gate(x)) * up(x))  |  LigerSwiGLUMLP   ->   errors, float64 gap

Both compute the same inputs twice, in the model's dtype and in float64. In float64 they must agree
but for float64's own rounding, whatever the dtype: a wrong eps, a swapped gate and up or a wrong
sign cannot hide behind bfloat16. In the dtype the module's error may not be larger than allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from liger_fx.errors import one_line
from liger_fx.verification.accuracy import ROUNDING, Comparison
from liger_fx.verification.measure import Run
from liger_fx.verification.pairing import pairs
from liger_fx.verification.reference import exact, in_float64, to_float64
from liger_fx.verification.replay import Capture, Place, Values, attribute
from liger_fx.verification.whole import SINGLE, Totals, merged

GAP = 1e-9  # float64 rounds to 1e-16; what is computed otherwise differs by far more than this


@dataclass(frozen=True)
class SiteCheck:
    """What was found at one site.

    fault: what is wrong, None when nothing is.
    gap: relative L2 distance of module and replaced nodes, both in float64, outputs and gradients.
    outputs, gradients: errors against float64; None, like gap, when the site could not be run.
    in_doubt: nothing is wrong but an error that fails by little.
    """

    path: str
    rule: str
    class_name: str
    fault: str | None = None
    gap: float | None = None
    outputs: Comparison | None = None
    gradients: Comparison | None = None
    in_doubt: bool = False


class SiteChecks:
    """The sites of one model on the tensors of several calls, by the path of the named module."""

    def __init__(self, model: nn.Module, opt: nn.Module) -> None:
        self.opt = opt
        shared = {id(p) for p in model.parameters()}
        # One that was loaded, say, has weights of its own: they are held against the model's.
        self.own_weights = shared.isdisjoint(map(id, opt.parameters()))
        self.parameters = dict(opt.named_parameters(remove_duplicate=False))
        self._found: dict[str, _Found] = {}

    def run(
        self,
        plain: nn.Module,
        traced: fx.Graph,
        rewritten: fx.Graph,
        prefix: str,
        calls: Iterable[tuple[Any, ...]],
    ) -> None:
        """Run every node of `rewritten` that a rule made.

        plain, traced: the block as the model has it and its graph before it was rewritten; calls:
        inputs of that graph. prefix: where the graph's paths begin in the model.
        Raises LookupError where the two graphs do not fit together.
        """
        places = [Place.of(pair) for pair in pairs(traced, rewritten)]
        wanted = {node for place in places for node in place.read()}
        exactly = in_float64(plain)
        for inputs in calls:
            values = Capture(plain, traced, wanted).values_for(inputs)
            for place in places:
                path = prefix + str(place.pair.call.target)
                module = self.opt.get_submodule(path)
                rule = place.pair.call.meta["rewrite"].rule
                found = self._found.setdefault(path, _Found(path, rule, type(module).__name__))
                if found.fault is None:
                    found.fault = self._run(place, plain, exactly, module, values, found, prefix)

    def _run(
        self,
        place: Place,
        traced: nn.Module,
        exactly: nn.Module,
        module: nn.Module,
        values: Values,
        found: _Found,
        prefix: str,
    ) -> str | None:
        """Add one call's runs of a site to what was found; why that cannot be, if it cannot."""
        own: dict[str, str] = {}
        names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
        for path, parameter in place.parameters(traced).items():
            counterpart = self._counterpart(prefix + path, parameter)
            if path not in place.passed and id(counterpart) not in names:
                return f"the model's {prefix}{path} is no parameter of the module"
            if counterpart is not parameter and not torch.equal(counterpart, parameter):
                return f"its {prefix}{path} has other values than the model's"
            if path not in place.passed:
                own[path] = names[id(counterpart)]
        try:
            runs = _four_runs(place, own, traced, exactly, module, values)
        except Exception as error:  # a faulty module may fail in any way it likes
            return f"it raises {type(error).__name__}: {one_line(error)}"
        found.add(*runs)
        return None

    def _counterpart(self, path: str, parameter: nn.Parameter) -> torch.Tensor:
        """The model's parameter itself, or the one of that path in a model with its own weights."""
        if not self.own_weights:
            return parameter
        return self.parameters.get(path, parameter)

    def judged(self) -> list[SiteCheck]:
        """A check of each site, in the graph's order."""
        return [found.judged() for found in self._found.values()]


@dataclass
class _Found:
    """What was measured at one site so far: in the dtype, and in float64."""

    path: str
    rule: str
    class_name: str
    fault: str | None = None
    short: Totals = field(default_factory=Totals)
    long: Totals = field(default_factory=Totals)
    rounding: float = 0.0

    def add(self, original: Run, optimised: Run, original_64: Run, optimised_64: Run) -> None:
        """Count one call."""
        self.short.add(original_64, original, optimised)
        self.long.add(original_64, original_64, optimised_64)
        self.rounding = max(ROUNDING[result.dtype] for result in original.outputs.values())

    def judged(self) -> SiteCheck:
        """The check of all calls together."""
        check = functools.partial(SiteCheck, self.path, self.rule, self.class_name)
        if self.fault is not None:
            return check(self.fault)
        both = [*self.long.outputs.values(), *self.long.gradients.values()]
        gap = Comparison.of("gap", merged(both), 1.0, 0.0).optimised
        outputs, grads = (
            Comparison.of(name, merged(squares.values()), SINGLE, self.rounding)
            for name, squares in (
                ("outputs", self.short.outputs),
                ("gradients", self.short.gradients),
            )
        )
        fault = _fault(self.short, gap)
        if fault is not None:
            return check(fault, gap, outputs, grads)
        failing = [c for c in (outputs, grads) if not c.ok]
        if not failing:
            return check(None, gap, outputs, grads)
        fault = f"its {failing[0].name} have {failing[0].ratio:.2f} x the original's error"
        return check(fault, gap, outputs, grads, in_doubt=all(c.in_doubt for c in failing))


def _four_runs(
    place: Place,
    own: dict[str, str],
    traced: nn.Module,
    exactly: nn.Module,
    module: nn.Module,
    values: Values,
) -> tuple[Run, Run, Run, Run]:
    """Replaced nodes and module in the dtype, then both in float64.

    own: the parameters' paths in the tree, and their names in the module.
    """

    def original(tree: nn.Module, given: Values) -> Run:
        parameters = {path: attribute(tree, path) for path in (*own, *place.passed)}
        return place.run_replaced(tree, parameters, given)

    def optimised(module: nn.Module, tree: nn.Module, given: Values) -> Run:
        parameters = {path: attribute(module, name) for path, name in own.items()}
        parameters |= {path: attribute(tree, path) for path in place.passed}
        return place.run_module(module, tree, parameters, given)

    short = original(traced, values), optimised(module, traced, values)
    with exact():
        long = to_float64(values)
        return *short, original(exactly, long), optimised(in_float64(module), exactly, long)


def _fault(totals: Totals, gap: float) -> str | None:
    if totals.faults:
        return totals.faults[0]
    if not gap <= GAP:
        return f"it computes something else: in float64 it is off by {gap:.1e}"
    return None
