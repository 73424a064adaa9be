"""Who compiles what Dynamo follows at this moment.

    inside torch.compile(...)                        inductor_compiles() is True
    inside torch.export, or for another compiler     False

Only what model/inductor.py takes part in counts: it makes of the graph what code that asks relies
on.
"""

from weakref import WeakSet

import torch
from torch._guards import TracingContext

_BY_INDUCTOR: WeakSet[TracingContext] = WeakSet()


def inductor_will_compile(context: TracingContext) -> None:
    """Note that of what is recorded in this context."""
    _BY_INDUCTOR.add(context)


@torch.compiler.assume_constant_result
def inductor_compiles() -> bool:
    """Whether Inductor compiles what Dynamo follows now."""
    return TracingContext.try_get() in _BY_INDUCTOR
