"""A training step on a GPU: time, tokens/s, peak memory and loss of several variants of one model.

    python tools/bench/training_step.py --model llama1b  ->  results/training_step.json and a table

The variants are transformers eager, liger_fx, liger-kernel (where installed), and torch.compile of
the first two, also with dynamic=True. Each runs in a process of its own, in which nothing is
compiled yet: liger-kernel's patch of one instance rebinds names in transformers' modules, so a
variant after it would be patched too. All share weights, data and
the learning rate, so that their losses must agree. bf16, SGD, SDPA attention, random ids as their
own labels, no cache; batch, length, adapters and checkpointing are those of the workload.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write
from tools.bench.gpu_time import try_gpu_time
from tools.bench.training_models import WORKLOADS, device
from tools.bench.training_models import prepare as prepared_model

LEARNING_RATE = 1e-2
WARM_UP = 4
BAR = 1.2  # x eager's tokens/s, llama1b

VARIANTS = (
    "eager", "liger_fx", "liger_kernel", "torch_compile", "liger_fx+torch_compile",
    "torch_compile_dynamic", "liger_fx+torch_compile_dynamic",
)  # fmt: skip


def prepare(variant: str, model: Any, example: dict[str, torch.Tensor]) -> Any:
    """The callable that the variant trains."""
    base = variant.partition("+")[0]
    if "liger_fx" in base:
        import liger_fx

        # Adapters stay around the model, as the user has put them there.
        inner = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
        if inner is not None:
            inner.model = liger_fx.optimize(inner.model, inputs=example)
        else:
            model = liger_fx.optimize(model, inputs=example)
    elif base == "liger_kernel":
        from liger_kernel import transformers as patches  # type: ignore[import-not-found]

        plain = model.base_model.model if hasattr(model, "peft_config") else model
        patches._apply_liger_kernel_to_instance(model=plain)
    if "torch_compile" in variant:
        return torch.compile(model, dynamic=True if variant.endswith("_dynamic") else None)
    return model


class Training:
    """One model, its optimizer and its fixed batch; `step` is what is timed."""

    def __init__(self, name: str, variant: str) -> None:
        workload = WORKLOADS[name]
        model = prepared_model(workload)
        torch.manual_seed(1)
        shape = workload.batch, workload.length
        ids = torch.randint(0, model.config.vocab_size, shape, device=device())
        self.inputs = {"input_ids": ids, "labels": ids}
        self.call = prepare(variant, model, self.inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)

    def step(self) -> torch.Tensor:
        loss = self.call(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(variant: str, name: str, steps: int, breakdown: bool) -> dict[str, Any]:
    """Runs `steps` timed steps after a warm-up; times in ms, memory in GiB. Needs a GPU."""
    tokens = WORKLOADS[name].batch * WORKLOADS[name].length
    begin = time.perf_counter()
    training = Training(name, variant)
    synchronize()
    prepared, begin = time.perf_counter() - begin, time.perf_counter()
    losses = [training.step().item()]
    first = time.perf_counter() - begin
    losses += [training.step().item() for _ in range(WARM_UP)]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, timed_losses = timed(training, steps)
    step_ms = statistics.median(times)
    return {
        "variant": variant,
        "model": name,
        "prepare_s": prepared,
        "first_step_s": first,
        "step_ms": step_ms,
        "step_ms_spread": [min(times), max(times)],
        "steps": steps,
        "tokens_per_s": tokens / step_ms * 1000,
        "peak_gib": peak_gib(),
        "losses": losses + timed_losses,
        "final_loss": timed_losses[-1],
        "breakdown_ms": try_gpu_time(training.step) if breakdown else None,
    }


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(training: Training, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each step between device events, and the losses, read after the last step."""
    if not torch.cuda.is_available():
        return timed_on_cpu(training, steps)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    losses = []
    marks[0].record()
    for mark in marks[1:]:
        losses.append(training.step())
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return times, [loss.item() for loss in losses]


def timed_on_cpu(training: Training, steps: int) -> tuple[list[float], list[float]]:
    times, losses = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(training.step().item())
        times.append(1000 * (time.perf_counter() - begin))
    return times, losses


def report(results: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["model"] for row in results):
        rows = [row for row in results if row["model"] == name]
        speeds = {row["variant"]: row.get("tokens_per_s", float("nan")) for row in rows}
        eager = speeds.get("eager", float("nan"))
        headers = ("variant", "first step s", "step ms", "tokens/s", "x eager", "GiB", "final loss")
        show(f"A training step of {name}", headers, [line(row, eager) for row in rows])
        for row in rows:
            if row.get("breakdown_ms"):
                shown = {k: v for k, v in row["breakdown_ms"].items() if k != "longest"}
                parts = {k: round(v, 1) if isinstance(v, float) else v for k, v in shown.items()}
                print(f"  {row['variant']}, ms of GPU time a step: {parts}")
        if name == "llama1b" and "liger_fx" in speeds:
            ratio = speeds["liger_fx"] / eager
            print(f"{'reached' if ratio >= BAR else 'MISSED'}: {ratio:.2f} x eager, of {BAR} x")


def line(row: dict[str, Any], eager: float) -> list[Any]:
    if "error" in row:
        return [row["variant"], "failed: " + row["error"].splitlines()[-1][:100]]
    peak = row["peak_gib"]
    return [
        row["variant"],
        f"{row['first_step_s']:.1f}",
        f"{row['step_ms']:.1f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['tokens_per_s'] / eager:.2f}",
        f"{peak:.2f}" if peak else "-",
        f"{row['final_loss']:.4f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=WORKLOADS, nargs="+", default=["llama1b"])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS[:4]))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--breakdown", action="store_true", help="GPU time by group of kernels")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one variant")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.json")
    parser.add_argument("--child", metavar="VARIANT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, steps = arguments.model[0], arguments.steps
        print(json.dumps(measure(arguments.child, name, steps, arguments.breakdown)))
        return 0
    results = []
    for name in arguments.model:
        for variant in arguments.variants:
            options = [variant, "--model", name, "--steps", str(arguments.steps)]
            options += ["--breakdown"] if arguments.breakdown else []
            with TemporaryDirectory() as cache:
                found = run_child(__file__, *options, timeout_s=arguments.timeout, cache=cache)
            results.append({"variant": variant, "model": name, **found})
            done = found.get("step_ms") or found["error"].splitlines()[-1]
            print(name, variant, done, flush=True)
            write(arguments.out, results)  # after each, so that a time limit loses one variant only
    report(results)
    return int(any("error" in row for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
