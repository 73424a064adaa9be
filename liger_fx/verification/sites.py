"""Each named module against the nodes it replaced, on the tensors that really arrive there.

    model.layers.0.mlp:  down(act(gate(x)) * up(x))  |  LigerSwiGLUMLP   ->   errors, float64 gap

Both compute the same inputs twice, in the model's dtype and in float64. In float64 they must agree
but for float64's own rounding, whatever the dtype: a wrong eps, a swapped gate and up or a wrong
sign cannot hide behind bfloat16. In the dtype the module's error may not be larger than allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from liger_fx.errors import one_line
from liger_fx.tracing.trace import Trace
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
    """

    path: str
    rule: str
    class_name: str
    fault: str | None = None
    gap: float | None = None
    outputs: Comparison | None = None
    gradients: Comparison | None = None


def check_sites(
    traced: Trace, rewritten: fx.Graph, opt: nn.Module, inputs: Mapping[str, Any]
) -> list[SiteCheck]:
    """Check every node of `rewritten` (its targets are paths below `opt`) that a rule made.

    inputs: keyword arguments of a call that `traced`, the same model's graph before, serves.
    Raises LookupError where the two graphs do not fit together.
    """
    places = [Place.of(pair) for pair in pairs(traced.graph, rewritten)]
    wanted = {node for place in places for node in place.read()}
    values = Capture(traced, wanted).values_for(inputs)
    exactly = in_float64(traced.root)
    return [_check(place, traced.root, exactly, opt, values) for place in places]


def _check(
    place: Place, traced: nn.Module, exactly: nn.Module, opt: nn.Module, values: Values
) -> SiteCheck:
    path, rule = str(place.pair.call.target), place.pair.call.meta["rewrite"].rule
    module = opt.get_submodule(path)
    check = functools.partial(SiteCheck, path, rule, type(module).__name__)
    parameters = place.parameters(traced)
    names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
    for name, parameter in parameters.items():
        if id(parameter) not in names:
            return check(f"the model's {name} is no parameter of the module")
    own = {path: names[id(parameter)] for path, parameter in parameters.items()}
    try:
        runs = _four_runs(place, own, traced, exactly, module, values)
    except Exception as error:  # a faulty module may fail in any way it likes
        return check(f"it raises {type(error).__name__}: {one_line(error)}")
    return check(*_judge(*runs))


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
        parameters = {path: attribute(tree, path) for path in own}
        return place.run_replaced(tree, parameters, given)

    def optimised(module: nn.Module, given: Values) -> Run:
        parameters = {path: attribute(module, name) for path, name in own.items()}
        return place.run_module(module, parameters, given)

    short = original(traced, values), optimised(module, values)
    with exact():
        long = to_float64(values)
        return *short, original(exactly, long), optimised(in_float64(module), long)


def _judge(
    original: Run, optimised: Run, original_64: Run, optimised_64: Run
) -> tuple[str | None, float, Comparison, Comparison]:
    """(fault, gap, outputs, gradients) from the four runs of a site."""
    totals, exact_totals = Totals(), Totals()
    totals.add(original_64, original, optimised)
    exact_totals.add(original_64, original_64, optimised_64)
    both = [*exact_totals.outputs.values(), *exact_totals.gradients.values()]
    gap = Comparison.of("gap", merged(both), 1.0, 0.0).optimised
    rounding = max(ROUNDING[result.dtype] for result in original.outputs.values())
    outputs = Comparison.of("outputs", merged(totals.outputs.values()), SINGLE, rounding)
    grads = Comparison.of("gradients", merged(totals.gradients.values()), SINGLE, rounding)
    return _fault(totals, gap, outputs, grads), gap, outputs, grads


def _fault(totals: Totals, gap: float, outputs: Comparison, grads: Comparison) -> str | None:
    if totals.faults:
        return totals.faults[0]
    if not gap <= GAP:
        return f"it computes something else: in float64 it is off by {gap:.1e}"
    for comparison in (outputs, grads):
        if not comparison.ok:
            return f"its {comparison.name} have {comparison.ratio:.2f} x the original's error"
    return None
