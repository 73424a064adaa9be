"""liger_fx.export: the rewritten graph as a torch.export program, our operators single nodes in it.

    opt   ->   model.pt2:  ..., torch.ops.liger_fx.rms_norm(x, weight, 1e-06, ...), ...

    import liger_fx.modules                          registers torch.ops.liger_fx
    program = torch.export.load("model.pt2").module()
    program(input_ids=ids, attention_mask=mask)["logits"]

Attention and masks, which our own graphs look up when they run, are traced through with the
implementation that the model has now.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liger_fx.errors import SaveError, UsageError, one_line
from liger_fx.inputs import example_arguments
from liger_fx.model.block import Block
from liger_fx.model.flatten import flat_plan
from liger_fx.model.plan import Plan
from liger_fx.storage import expressions
from liger_fx.storage.directory import write_file
from liger_fx.tracing.call import CallSpec, InputSpec, Opaque
from liger_fx.tracing.naming import describe_call, is_transformers

_EXAMPLE_SIZES = (3, 11, 13, 17, 19, 23)


def export(
    opt: nn.Module,
    path: str | PathLike[str],
    inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> torch.export.ExportedProgram:
    """Export what ``liger_fx.optimize`` returned for inference, and write it to ``path`` (.pt2).

    Batch and length may vary; what the model's code asks of them is checked when the program runs.
    A program of a transformers model takes the tensors by name and returns a dictionary of those
    its output has; it keeps no cache. The model is exported in eval mode and stays as it is.
    (Experts of transformers bring an operator of their own along: import
    transformers.integrations.moe as well before such a program is loaded.)

    inputs: the kind of call, as for ``liger_fx.optimize``.

    Raises SaveError where torch.export cannot follow (an attention implementation, say), or the
    file cannot be written; UsageError for what is no optimised model.
    """
    if not isinstance(opt, Block):
        raise UsageError(f"Expected what optimize() returned, got a {type(opt).__name__}.")
    if not isinstance(inputs, Mapping | tuple | None):
        raise UsageError(
            f"export takes inputs by name or in a tuple, not a {type(inputs).__name__}."
        )
    arguments = example_arguments(opt, inputs)
    if is_transformers(opt) and "use_cache" in inspect.signature(type(opt).forward).parameters:
        arguments["use_cache"] = False
    call = describe_call(opt, arguments, inner=False)
    if any(isinstance(spec, Opaque) for _, spec in call.leaves()):
        raise SaveError("A program takes tensors: pass inputs without a cache.")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own, about its insides
        exportable = _Exportable(*_inference_plan(opt, call))
        try:
            program = torch.export.export(
                exportable, (), _examples(call), dynamic_shapes=_dynamic(call), strict=False
            )
        except Exception as error:  # torch.export fails in many ways
            raise SaveError(
                f"{type(opt).__name__} cannot be exported: {one_line(error)}"
            ) from error
        _write(program, Path(path))
    return program


def _inference_plan(opt: Block, call: CallSpec) -> tuple[nn.Module, Plan]:
    modes = [(module, module.training) for module in opt.modules()]
    try:
        return flat_plan(opt.eval(), call)
    finally:
        for module, mode in modes:
            module.training = mode


class _Exportable(nn.Module):
    """A plan as a module: tensors by name in, tensors out."""

    def __init__(self, tree: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model = tree.eval()
        self.run, self.guards = plan.function, plan.guards
        self.inputs = [name for name, _ in plan.guards.call.leaves()]

        def forward(**tensors: torch.Tensor) -> Any:
            return self._call(tensors)

        # torch.export names the program's inputs by the signature
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in self.inputs]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def _call(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        self._check_sizes(tensors)
        result = self.run(self.model, *(tensors[name] for name in self.inputs))
        if isinstance(result, dict):  # a ModelOutput: its class is unknown where it is loaded
            return {k: v for k, v in result.items() if isinstance(v, torch.Tensor)}
        return result

    def _check_sizes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """What the graph's guards say of sizes becomes checks of the program."""
        sizes: dict[str, Any] = {}
        for name, spec in self.guards.call.tensors.items():
            for size, known in zip(tensors[name].shape, spec.sizes, strict=True):
                if isinstance(known, str):
                    torch._check(size == sizes.setdefault(known, size))
        functions = {"math": math, "min": torch.sym_min, "max": torch.sym_max, "abs": abs}
        for guard in self.guards.sizes:
            text = expressions.check(guard, sizes)
            torch._check(eval(text, {"__builtins__": {}, **functions}, sizes))


def _examples(call: CallSpec) -> dict[str, torch.Tensor]:
    names = {s for spec in call.tensors.values() for s in spec.sizes if isinstance(s, str)}
    defaults = dict(zip(sorted(names), _EXAMPLE_SIZES * len(names), strict=False))
    sizes = {**defaults, **call.hints}

    def example(spec: InputSpec) -> torch.Tensor:
        shape = [sizes[s] if isinstance(s, str) else s for s in spec.sizes]
        return torch.ones(shape, dtype=spec.dtype, device=spec.device)

    return {name: example(spec) for name, spec in call.tensors.items()}


def _dynamic(call: CallSpec) -> dict[str, Any]:
    """Batch and length must stay free; of other sizes torch.export finds out which can."""
    dim = torch.export.Dim
    return {
        name: {
            i: dim.DYNAMIC if size in ("batch", "sequence") else dim.AUTO
            for i, size in enumerate(spec.sizes)
            if isinstance(size, str)
        }
        for name, spec in call.tensors.items()
    }


def _write(program: torch.export.ExportedProgram, path: Path) -> None:
    """The file as a whole or not at all.

    PyTorch writes to memory: where a disk is full, its own writer of files ends the process.
    """
    memory = io.BytesIO()
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.pt2")
    with _removed_afterwards(new):
        try:
            torch.export.save(program, memory)
            write_file(new, memory.getbuffer())
            os.replace(new, path)
        except (OSError, RuntimeError) as error:
            raise SaveError(f"{path} could not be written: {one_line(error)}") from error


@contextlib.contextmanager
def _removed_afterwards(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
