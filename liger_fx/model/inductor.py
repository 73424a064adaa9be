"""Between Dynamo and Inductor: what Inductor is given of a graph, and told about it.

    Dynamo's graph -> logits that nothing reads are left out (logits_outside.py)
                   -> Inductor, told to hand no memory on where there are regions (regions.py)

For export, and any other compiler, a graph stays as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from liger_fx.kernels.compiling import inductor_will_compile
from liger_fx.model.dynamo import output_of
from liger_fx.model.inductor_start import InductorStart
from liger_fx.model.logits_outside import leave_logits_outside
from liger_fx.model.region_schemas import region_schemas_kept
from liger_fx.tracing.garbage import garbage_kept

# The default for what stands before Inductor. It would compile up to five forms of each pointwise
# kernel to time them, a second or two for cos and sin; where our operators are, few are left.
_NOT_TUNED = {"triton.autotune_pointwise": False}
_NOTHING_HANDED_ON = {"allow_buffer_reuse": False, "inplace_buffers": False}


class ForInductor:
    """A compiler of Dynamo's, which is Inductor or leads to it, for one graph."""

    def __init__(self, compiler: Any, inductor: Any, start: InductorStart) -> None:
        functools.update_wrapper(self, compiler)
        self._torchdynamo_orig_backend, self.inductor = compiler, inductor
        self._start = start
        self.has_regions = False

    @property
    def calls_regions(self) -> bool:
        """Whether regions can be compiled and called."""
        config = self.inductor.config
        return not config.get("cpp_wrapper", torch._inductor.config.cpp_wrapper)

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        complete = leave_logits_outside(graph)
        config = self.inductor.config
        self.inductor.config = _NOT_TUNED | config
        if self.has_regions:
            self.inductor.config |= _NOTHING_HANDED_ON
        try:
            # What is made here stays; to walk over it now and then takes a fifteenth of the time.
            with self._start.awaited(), region_schemas_kept(), garbage_kept():
                compiled = self._torchdynamo_orig_backend(graph, inputs)
        finally:
            self.inductor.config = config
        return compiled if complete is None else functools.partial(complete, compiled)


def for_inductor(context: Any, *, on_cpu: bool) -> ForInductor | None:
    """What stands before Inductor for the graph that Dynamo records here, from now on; None where
    another compiler will have it. on_cpu: whether a CPU will run it."""
    output = output_of(context)
    if isinstance(output.compiler_fn, ForInductor):
        return output.compiler_fn
    inductor = _innermost(output.compiler_fn)
    if not isinstance(inductor, torch._TorchCompileInductorWrapper) or output.export:
        return None
    start = InductorStart(for_cpu=on_cpu)
    output.compiler_fn = ForInductor(output.compiler_fn, inductor, start)
    inductor_will_compile(output.tracing_context)
    return output.compiler_fn


def _innermost(compiler: Any) -> Any:
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend
    return compiler
