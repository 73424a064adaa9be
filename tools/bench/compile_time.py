"""The first step of a Llama of 16 layers under torch.compile, forward and backward: what it takes
for the original and for what liger_fx makes of it.

    python tools/bench/compile_time.py
 ->
    results/compile_time_gpu.json (compile_time.json without a GPU) and a table

On a GPU of the size of Llama 1B, else a tiny one. Each measurement has a process and empty caches
of its own. "started": a trivial function was compiled there before the clock starts, so that what
any first compile takes (imports, Inductor's workers, the headers of its C++) is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write

BAR = 1 / 3  # of what the original takes
MODELS = ("original", "liger_fx")
STARTS = ("bare", "started")


def first_step(model: str, start: str) -> dict[str, float]:
    """Seconds from the call of the compiled model to the end of its backward."""
    import liger_fx

    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with device:
        llama: Any = LlamaForCausalLM(_config(on_gpu)).train()
        ids = torch.randint(0, llama.config.vocab_size, (4, 2048) if on_gpu else (2, 16))
    inputs = {"input_ids": ids, "labels": ids}
    if on_gpu:
        llama = llama.bfloat16()
    if model == "liger_fx":
        llama = liger_fx.optimize(llama, inputs=inputs)
    if start == "started":
        trivial = torch.compile(lambda x: (x + 1).sin().sum())
        trivial(torch.ones(8, 8, device=device, requires_grad=True)).backward()
    begun = time.perf_counter()
    loss = torch.compile(llama)(**inputs).loss
    loss.backward()
    return {"loss": loss.item(), "first_step_s": time.perf_counter() - begun}


def _config(on_gpu: bool) -> LlamaConfig:
    tiny = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    large = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256}
    heads = (32, 8) if on_gpu else (4, 2)
    sizes: dict[str, Any] = {**(large if on_gpu else tiny), "num_hidden_layers": 16}
    sizes |= zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True)
    return LlamaConfig(use_cache=False, **sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=240)
    name = "compile_time_gpu.json" if torch.cuda.is_available() else "compile_time.json"
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "START"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(first_step(*options.child)))
        return 0
    results = []
    for number in range(options.rounds):
        for start in STARTS:
            for model in MODELS:  # in turn, so that a busy machine slows both
                with tempfile.TemporaryDirectory() as cache:
                    found = run_child(
                        __file__, model, start, timeout_s=options.timeout, cache=cache
                    )
                results.append({"model": model, "start": start, "round": number, **found})
                print(results[-1], flush=True)
                write(options.out, results)
    return report(results)


def shortest(results: list[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Of each start the shortest first step of the original and of liger_fx, in seconds."""
    for start in STARTS:
        original, ours = (
            min(
                row.get("first_step_s", float("inf"))
                for row in results
                if (row["model"], row["start"]) == (model, start)
            )
            for model in MODELS
        )
        yield start, original, ours


def report(results: list[dict[str, Any]]) -> int:
    """Prints the shortest of each, and tells by 1 that the bar is not held."""
    found = list(shortest(results))
    rows = [(start, f"{a:.1f} s", f"{b:.1f} s", f"{b / a:.2f}") for start, a, b in found]
    show("The first compiled step", ("start", *MODELS, "ratio"), rows)
    return int(any(ours > BAR * original for _, original, ours in found))


if __name__ == "__main__":
    sys.exit(main())
