"""liger-fx bench: time a training step of a model and of its optimised twin, here and now.

    liger-fx bench ./my-model --dtype bfloat16 --batch 4 --length 2048
    liger-fx bench llama --compile                  torch.compile of the original, too

Forward, loss and backward on random tokens, on the GPU if there is one. Each variant runs in a
process of its own, with the same weights and tokens; the median of the steps counts.

Exit codes: 0 done; 2 it could not be done, or a variant failed: standard error says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from liger_fx.commands.console import add_command, progress, say
from liger_fx.commands.models import (
    add_choosing,
    add_making,
    add_model,
    load,
    optimized,
    positive,
    start,
)
from liger_fx.errors import UsageError

_WARM_UP = 3
_ORIGINAL, _OPTIMISED, _COMPILED = "original", "liger_fx", "torch.compile"


def add_parser(commands: Any) -> None:
    """Add the command to those of liger-fx."""
    summary = "time a training step of a model and of its optimised twin"
    parser = add_command(commands, "bench", summary, __doc__, run)
    add_model(parser)
    add_making(parser)
    add_choosing(parser)
    for name, default, what in (
        ("batch", 4, "rows of tokens in a step"),
        ("length", 128, "tokens in a row"),
        ("steps", 20, "steps that count"),
    ):
        text = f"{what}, {default} by default"
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=text)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the original, too")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # the process that measures one


def run(arguments: argparse.Namespace) -> int:
    """Measure each variant in a process of its own and print the table; or measure one."""
    if arguments.variant:
        print(json.dumps(_measure(arguments)))
        return 0
    found: dict[str, dict[str, Any]] = {}
    for name in (_ORIGINAL, _OPTIMISED, *([_COMPILED] if arguments.compile else [])):
        with progress(f"{name}: {_WARM_UP} + {arguments.steps} steps"):
            found[name] = _in_a_process(name, arguments)
    print(_table(found, arguments.batch * arguments.length))
    return 2 if any("failed" in result for result in found.values()) else 0


def _in_a_process(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the same command says of one variant; a variant that fails does not hide the others."""
    command = [sys.executable, "-m", "liger_fx", "bench", arguments.model, "--variant", variant]
    for name in ("dtype", "layers", "batch", "length", "steps", "rules", "exclude"):
        value = getattr(arguments, name)
        if value:
            values = value if isinstance(value, list) else [value]
            command += [f"--{name}", *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    said = [line for line in done.stderr.splitlines() if not line.startswith(("==>", "    "))]
    why = said[-1] if said else f"exit code {done.returncode}"
    say(f"liger-fx: {variant}: {why.removeprefix('liger-fx: ')}")
    return {"failed": why}


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, bytes at the peak, and the first loss, of one variant."""
    start()
    import torch

    from liger_fx.inputs import example_inputs

    torch.manual_seed(0)  # random weights are the same ones in every process
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(arguments.model, arguments, weights=True).to(device).train()
    inputs = example_inputs(model, arguments.batch, arguments.length)
    if "labels" not in inputs:
        raise UsageError(f"A {type(model).__name__} has no loss to train with.")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["labels"] = inputs["input_ids"]
    step = _step(_variant(model, arguments), inputs)
    loss = step()
    for _ in range(_WARM_UP):
        step()
    seconds = [_seconds(step) for _ in range(arguments.steps)]
    return {"seconds": statistics.median(seconds), "bytes": _peak_bytes(), "loss": loss}


def _variant(model: Any, arguments: argparse.Namespace) -> Any:
    if arguments.variant == _OPTIMISED:
        return optimized(model, arguments)
    if arguments.variant == _COMPILED:
        import torch

        return torch.compile(model)
    return model


def _step(model: Any, inputs: dict[str, Any]) -> Callable[[], float]:
    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        value: float = loss.item()  # waits for the GPU, too
        return value

    return step


def _seconds(step: Callable[[], float]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _peak_bytes() -> int:
    """Of the GPU's memory, or of the process where there is none."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(found: dict[str, dict[str, Any]], tokens: int) -> str:
    import torch
    from tabulate import tabulate

    from liger_fx.report.facts import versions

    base = found[_ORIGINAL].get("seconds")
    rows = []
    for name, result in found.items():
        if "failed" in result:
            rows.append((name, "failed", "", "", "", ""))
            continue
        seconds = result["seconds"]
        times = f"{base / seconds:.2f}" if base else ""
        speed, memory = f"{tokens / seconds:,.0f}", f"{result['bytes'] / 2**20:,.0f} MiB"
        rows.append(
            (name, f"{seconds * 1e3:.1f} ms", speed, times, memory, f"{result['loss']:.4f}")
        )
    headers = ("variant", "step", "tokens/s", f"x {_ORIGINAL}", "peak memory", "first loss")
    align = ("left", *["right"] * 5)
    table = tabulate(rows, headers, disable_numparse=True, colalign=align)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{table}\n\n{gpu}, {', '.join(f'{k} {v}' for k, v in versions().items())}"
