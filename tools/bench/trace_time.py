"""Time to trace and rewrite a Llama, beside the time DynamoExporter needs to export it.

    python tools/bench/trace_time.py  ->  tools/bench/results/trace_time.json and a table

Each measurement runs in a process of its own on one CPU thread, the two tools in turn, so that a
busy machine slows both; the table shows the median. A model of one layer warms each process up
(imports, caches) before the clock starts. Widths are small: tracing time does not depend on them.
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write

DEPTHS = (8, 32, 128)
BAR = 0.10  # of DynamoExporter's time, at 32 layers


def llama(layers: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": torch.randint(0, 256, (3, 11)), "attention_mask": mask}


def with_liger_fx(model: PreTrainedModel) -> None:
    import liger_fx

    liger_fx.optimize(model, inputs=inputs())


def with_dynamo_exporter(model: PreTrainedModel) -> None:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    DynamoExporter().export(model, inputs(), config=DynamoConfig(dynamic=True))


TOOLS: dict[str, Callable[[PreTrainedModel], None]] = {
    "liger_fx": with_liger_fx,
    "DynamoExporter": with_dynamo_exporter,
}


def measure(tool: str, layers: int) -> dict[str, float]:
    """Seconds on the clock and of CPU time for one model, after a warm-up on one of one layer."""
    torch.set_num_threads(1)
    TOOLS[tool](llama(1))
    model = llama(layers)
    wall, cpu = time.perf_counter(), time.process_time()
    TOOLS[tool](model)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def collect(depths: list[int], rounds: int, timeout_s: float) -> list[dict[str, Any]]:
    rows = []
    for layers in depths:
        for round_ in range(rounds):
            for tool in TOOLS:
                found = run_child(__file__, tool, str(layers), timeout_s=timeout_s)
                rows.append({"tool": tool, "layers": layers, "round": round_, **found})
                print(rows[-1], flush=True)
    return rows


def median(rows: list[dict[str, Any]], tool: str, layers: int, key: str = "seconds") -> float:
    picked = [r[key] for r in rows if (r["tool"], r["layers"]) == (tool, layers) and key in r]
    return statistics.median(picked) if picked else float("nan")


def summarise(rows: list[dict[str, Any]], depths: list[int]) -> dict[str, Any]:
    """The table's numbers: medians, their ratio, and milliseconds a layer (level when linear)."""
    table = []
    for layers in depths:
        ours, theirs = (median(rows, tool, layers) for tool in TOOLS)
        cpu = median(rows, "liger_fx", layers, "cpu_seconds")
        cpu_theirs = median(rows, "DynamoExporter", layers, "cpu_seconds")
        table.append(
            {
                "layers": layers,
                "liger_fx_s": ours,
                "dynamo_exporter_s": theirs,
                "ratio": ours / theirs,
                "cpu_ratio": cpu / cpu_theirs,
                "liger_fx_ms_per_layer": 1000 * ours / layers,
            }
        )
    return {"table": table, "bar": BAR}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--child", nargs=2, metavar=("TOOL", "LAYERS"), help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "trace_time.json")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], int(arguments.child[1]))))
        return 0
    rows = collect(arguments.layers, arguments.rounds, arguments.timeout)
    summary = summarise(rows, arguments.layers)
    write(arguments.out, {**summary, "measurements": rows})
    headers = ("layers", "liger_fx s", "DynamoExporter s", "ratio", "CPU-time ratio", "ms a layer")
    show("Tracing and rewriting", headers, [list(row.values()) for row in summary["table"]])
    at_32 = [row["ratio"] for row in summary["table"] if row["layers"] == 32]
    if at_32 and not at_32[0] <= BAR:
        print(f"MISSED: {at_32[0]:.2f} x DynamoExporter's time at 32 layers; the bar is {BAR}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
