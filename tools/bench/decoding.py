"""Greedy decoding: tokens/s of transformers, optimised and not, with a dynamic and a static cache.

    python tools/bench/decoding.py --model llama1b  ->  results/decoding.json and a table

Each variant runs in a process of its own, on the same weights and prompt; the tokens are compared.
With a static cache transformers compiles the decoding step; liger_fx records it as a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write
from tools.bench.gpu_time import try_gpu_time
from tools.bench.training_models import MODELS, build, device

VARIANTS = ("eager", "eager_static", "liger_fx", "liger_fx_static", "liger_kernel")
STEPS = 32  # that the breakdown looks at


def measure(
    variant: str, name: str, batch: int, prompt: int, new: int, breakdown: bool
) -> dict[str, Any]:
    """Seconds of one generate() after a warm-up, the median of five, and the tokens."""
    model: Any = build(name).eval()
    model.generation_config.use_cache = model.config.use_cache = True
    model.generation_config.pad_token_id = 0
    if variant.startswith("liger_fx"):
        import liger_fx

        model = liger_fx.optimize(model)
    elif variant == "liger_kernel":
        from liger_kernel import transformers as patches  # type: ignore[import-not-found]

        patches._apply_liger_kernel_to_instance(model=model)
    torch.manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=device())
    cache = "static" if variant.endswith("_static") else None

    def generate(new: int) -> torch.Tensor:
        length: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
        found: torch.Tensor = model.generate(
            ids, do_sample=False, cache_implementation=cache, **length
        )
        return found

    times, tokens = [], None
    for _ in range(6):
        begin = time.perf_counter()
        tokens = generate(new)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    assert tokens is not None
    seconds = statistics.median(times[1:])
    return {
        "variant": variant,
        "model": name,
        "batch": batch,
        "prompt": prompt,
        "new_tokens": new,
        "tokens_per_s": batch * new / seconds,
        "first_call_s": times[0],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "breakdown_ms": step_time(generate) if breakdown else None,
        "tokens": tokens[0, prompt:].tolist(),
    }


def step_time(generate: Callable[[int], Any]) -> dict[str, float] | None:
    """Milliseconds of GPU time of one decoding step by group of kernels: what some steps more
    take."""
    one = try_gpu_time(lambda: generate(1), steps=1)
    more = try_gpu_time(lambda: generate(1 + STEPS), steps=1)
    if one is None or more is None or "error" in one or "error" in more:
        return more or one
    return {group: (more[group] - one[group]) / STEPS for group in one if group != "longest"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="llama1b")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS[:4]))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--breakdown", action="store_true", help="GPU time by group of kernels")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.prompt, arguments.new
    if arguments.child:
        name, batch = arguments.model, arguments.batch[0]
        found = measure(arguments.child, name, batch, *sizes, arguments.breakdown)
        print(json.dumps(found))
        return 0
    results: list[dict[str, Any]] = []
    for batch in arguments.batch:
        for variant in arguments.variants:
            options = [variant, "--model", arguments.model, "--batch", str(batch)]
            options += ["--prompt", str(sizes[0]), "--new", str(sizes[1])]
            options += ["--breakdown"] if arguments.breakdown else []
            found = run_child(__file__, *options, timeout_s=200)
            results.append({"variant": variant, "batch": batch, **found})
            write(arguments.out, results)
    rows = []
    for row in results:
        eager = next(r for r in results if r["batch"] == row["batch"])
        same = row.get("tokens") == eager.get("tokens")
        speed = row.get("tokens_per_s", float("nan"))
        ratio = speed / eager.get("tokens_per_s", float("nan"))
        rows.append((row["batch"], row["variant"], f"{speed:.1f}", f"{ratio:.2f}", same))
    told = [{k: v for k, v in row.items() if k != "tokens"} for row in results]
    write(arguments.out, told)
    show("Decoding", ("batch", "variant", "tokens/s", "x eager", "tokens as eager"), rows)
    return int(any("error" in row for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
