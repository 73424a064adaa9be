"""A training step on a GPU: time, tokens/s, peak memory and loss of several variants of one model.

    python tools/bench/training_step.py --model llama1b  ->  results/training_step.json and a table

The variants are transformers eager, liger_fx, liger-kernel (where installed), and torch.compile of
the first two. Each runs in a process of its own: liger-kernel's patch of one instance rebinds names
in transformers' modules, so a variant after it would be patched too. All share weights, data and
the learning rate, so that their losses must agree. bf16, SGD, SDPA attention, 4 x 2048 tokens of
random ids as their own labels, no cache and no gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write

BATCH, LENGTH = 4, 2048
LEARNING_RATE = 1e-2
WARM_UP = 4
BAR = 1.2  # x eager's tokens/s, llama1b

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "llama8b": (  # 8 of the 32 layers
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "qwen3": (  # the 1.7B shape, 14 of its 28 layers
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 14,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "tiny": (  # for a look at the script itself, on any device
        "llama",
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
    ),
}
VARIANTS = ("eager", "liger_fx", "liger_kernel", "torch_compile", "liger_fx+torch_compile")

# Kernel names hold these words; the first group that fits takes the kernel.
GROUPS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "optimizer": ("multi_tensor",),
    "fused kernels": ("_forward_kernel", "_backward_kernel", "_sum_kernel", "rope", "triton"),
}


def build(name: str) -> PreTrainedModel:
    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**sizes, use_cache=False)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    return model.train()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(variant: str, model: torch.nn.Module, example: dict[str, torch.Tensor]) -> Any:
    """The callable that the variant trains."""
    base, _, compiled = variant.partition("+")
    if "liger_fx" in base:
        import liger_fx

        model = liger_fx.optimize(model, inputs=example)
    elif base == "liger_kernel":
        from liger_kernel import transformers as patches  # type: ignore[import-not-found]

        patches._apply_liger_kernel_to_instance(model=model)
    if base == "torch_compile" or compiled:
        return torch.compile(model)
    return model


class Training:
    """One model, its optimizer and its fixed batch; `step` is what is timed."""

    def __init__(self, name: str, variant: str, batch: int, length: int) -> None:
        model = build(name)
        torch.manual_seed(1)
        vocabulary = model.config.vocab_size
        ids = torch.randint(0, vocabulary, (batch, length), device=device())
        self.inputs = {"input_ids": ids, "labels": ids}
        self.call = prepare(variant, model, self.inputs)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step(self) -> torch.Tensor:
        loss = self.call(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(variant: str, name: str, steps: int, breakdown: bool) -> dict[str, Any]:
    """Runs `steps` timed steps after a warm-up; times in ms, memory in GiB. Needs a GPU."""
    batch, length = (2, 64) if name == "tiny" else (BATCH, LENGTH)
    begin = time.perf_counter()
    training = Training(name, variant, batch, length)
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
        "tokens_per_s": batch * length / step_ms * 1000,
        "peak_gib": peak_gib(),
        "losses": losses + timed_losses,
        "final_loss": timed_losses[-1],
        "breakdown_ms": gpu_time(training) if breakdown and torch.cuda.is_available() else None,
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


def gpu_time(training: Training, steps: int = 3) -> dict[str, Any]:
    """Milliseconds of GPU time a step by group of kernels, and the ten longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            training.step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent = event.self_device_time_total / 1000 / steps
            kernels[event.name] = kernels.get(event.name, 0.0) + spent
    groups = dict.fromkeys([*GROUPS, "everything else"], 0.0)
    for kernel, spent in kernels.items():
        groups[group_of(kernel)] += spent
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:10]
    return {**groups, "total": sum(kernels.values()), "longest": dict(longest)}


def group_of(kernel: str) -> str:
    name = kernel.lower()
    if name == "_kernel":  # liger_fx's rotary embedding
        return "fused kernels"
    found = (group for group, words in GROUPS.items() if any(word in name for word in words))
    return next(found, "everything else")


def report(results: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["model"] for row in results):
        rows = [row for row in results if row["model"] == name]
        speeds = {row["variant"]: row.get("tokens_per_s", float("nan")) for row in rows}
        eager = speeds.get("eager", float("nan"))
        headers = ("variant", "first step s", "step ms", "tokens/s", "x eager", "GiB", "final loss")
        show(f"A training step of {name}", headers, [line(row, eager) for row in rows])
        for row in rows:
            if row.get("breakdown_ms"):
                parts = {k: round(v, 1) for k, v in row["breakdown_ms"].items() if k != "longest"}
                print(f"  {row['variant']}: {parts}")


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
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["llama1b"])
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
            found = run_child(__file__, *options, timeout_s=arguments.timeout)
            results.append({"variant": variant, "model": name, **found})
            done = found.get("step_ms") or found["error"].splitlines()[-1]
            print(name, variant, done, flush=True)
            write(arguments.out, results)  # after each, so that a time limit loses one variant only
    report(results)
    return int(any("error" in row for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
