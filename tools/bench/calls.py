"""What it costs to call a named module on little data, beside what it stands for: the Python and
the launches, not the work.

    python tools/bench/calls.py  ->  results/calls.json (calls_cpu.json without a GPU) and a table

8 rows of width 2048: no kernel takes longer than its launch. Without grad, with, and with the
backward. F.rms_norm, one operator of PyTorch's own, shows what a call can cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import liger_fx
from tools.bench.common import RESULTS, show, write
from tools.bench.training_models import device

WIDTH, ROWS, HEADS = 2048, 8, 16
ROUNDS, CALLS = 15, 200
WAYS = ("no_grad", "forward", "backward")

Case = tuple[Callable[..., Any], list[torch.Tensor]]


def cases() -> dict[str, dict[str, Case]]:
    """By name, the original and what stands for it, each with its inputs."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=64,
    )  # fmt: skip
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device(), dtype)
    ours = liger_fx.optimize(model)
    layer, new = model.model.layers[0], ours.model.layers[0]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device(), dtype=dtype)

    x, width = draw(1, ROWS, WIDTH).requires_grad_(), WIDTH // HEADS
    q, k = (draw(1, HEADS, ROWS, width).requires_grad_() for _ in range(2))
    cos, sin = draw(1, ROWS, width), draw(1, ROWS, width)
    norm, weight = layer.input_layernorm, layer.input_layernorm.weight
    rotary = new.self_attn.rotary_embedding
    return {
        "RMSNorm": {
            "original": (norm, [x]),
            "liger_fx": (new.input_layernorm, [x]),
            "F.rms_norm": (lambda h: F.rms_norm(h, (WIDTH,), weight, 1e-6), [x]),
        },
        "rotary embedding": {
            "original": (lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), [q, k]),
            "liger_fx": (lambda q, k: rotary(q, k, cos, sin), [q, k]),
        },
        "gated MLP": {"original": (layer.mlp, [x]), "liger_fx": (new.mlp, [x])},
        "residual add + RMSNorm": {
            "original": (lambda h: _added(norm, h), [x]),
            "liger_fx": (lambda h: new.post_attention_layernorm(h, h), [x]),
        },
    }


def _added(norm: Callable[..., Any], h: torch.Tensor) -> Any:
    total = h + h
    return norm(total), total


def call(case: Case, way: str) -> None:
    function, inputs = case
    if way == "no_grad":
        with torch.no_grad():
            function(*inputs)
        return
    results = function(*inputs)
    if way == "backward":
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        for tensor in inputs:
            tensor.grad = None


def microseconds(variants: dict[str, Case], way: str) -> dict[str, float]:
    """Of a call, the median over rounds in which the variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, case in variants.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call(case, way)
            synchronize()
            times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {name: statistics.median(rounds[2:]) for name, rounds in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    name = "calls.json" if device() == "cuda" else "calls_cpu.json"
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        name: {way: microseconds(variants, way) for way in WAYS}
        for name, variants in cases().items()
    }
    write(arguments.out, found)
    rows = [
        (name, variant, *(f"{ways[way][variant]:.0f}" for way in WAYS))
        for name, ways in found.items()
        for variant in ways[WAYS[0]]
    ]
    headers = ("module", "variant", "no grad, µs", "forward, µs", "forward + backward, µs")
    show(f"A call on {ROWS} rows of {WIDTH}", headers, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
