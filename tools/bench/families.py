"""The held families on this machine's device: outputs and gradients of the rewrite by promise 6.

    python tools/bench/families.py  ->  results/families.json and a table

Each family is built small but with the head widths of real models, run at several shapes in
float32, bfloat16, float16 and bfloat16 autocast, padded and not, and compared with the original and
with a float64 run of the same weights. A family that fails is a row like any other.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.accuracy import Judge, float64_copy, measure
from tests.support.families import EVERY_EXPERT, FAMILIES, Scale, build, make_inputs
from tools.bench.common import RESULTS, show, write

SCALE = Scale(hidden=520, intermediate=1376, heads=8, kv_heads=2, head_dim=64, layers=2)
WIDE_HEADS = Scale(hidden=520, intermediate=1376, heads=4, kv_heads=1, head_dim=128, layers=2)
SHAPES = ((1, 17), (2, 129), (3, 61))
# name -> dtype of the weights, dtype of the autocast region, scale of the loss (float16's small
# gradients vanish without one, in both models alike)
MODES: dict[str, tuple[torch.dtype, torch.dtype | None, float]] = {
    "fp32": (torch.float32, None, 1.0),
    "bf16": (torch.bfloat16, None, 1.0),
    "fp16": (torch.float16, None, 256.0),
    "autocast bf16": (torch.float32, torch.bfloat16, 1.0),
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def judged(name: str, mode: str, scale: Scale, train: bool) -> dict[str, Any]:
    """One family in one mode: errors of both, ratios, and the faults by promise 6."""
    import liger_fx

    dtype, autocast, loss_scale = MODES[mode]
    routing = {} if mode == "fp32" else EVERY_EXPERT.get(name, {})
    model = build(name, dtype=dtype, device=device(), scale=scale, **routing).train(train)
    example = make_inputs(model, pad=True, labels=True)
    opt = liger_fx.optimize(model, inputs=example)
    exact = float64_copy(model)
    judge = Judge()
    for (batch, length), pad in itertools.product(SHAPES, (False, True)):
        inputs = make_inputs(model, batch, length, pad=pad, labels=True)
        judge.add(
            measure(exact, inputs, float64=True, loss_scale=loss_scale),
            measure(model, inputs, autocast=autocast, loss_scale=loss_scale),
            measure(opt, inputs, autocast=autocast, loss_scale=loss_scale),
        )
    parameter, worst = judge.worst_parameter()
    return {
        "outputs": judge.outputs.errors(),
        "outputs_ratio": judge.ratio(judge.outputs),
        "gradients": judge.gradients.errors(),
        "gradients_ratio": judge.ratio(judge.gradients),
        "worst_parameter": parameter,
        "worst_parameter_ratio": worst,
        "rewritten": len(opt.report.rewritten),
        "refused": len(opt.report.refused),
        "faults": judge.faults(),
    }


def attempt(name: str, mode: str, scale: Scale, train: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"family": name, "mode": mode, "head_dim": scale.head_dim, "train": train}
    begin = time.perf_counter()
    try:
        row |= judged(name, mode, scale, train)
    except Exception as error:  # a family that breaks is a result, and must not hide the next
        row["faults"] = [f"{type(error).__name__}: {error}"]
        row["traceback"] = traceback.format_exc()
    row["seconds"] = time.perf_counter() - begin
    gc.collect()
    return row


def line(row: dict[str, Any]) -> list[str]:
    verdict = "; ".join(fault.splitlines()[0][:70] for fault in row["faults"]) or "holds"
    if "outputs" not in row:
        return [row["family"], row["mode"], str(row["head_dim"]), "", "", "", "", verdict]
    return [
        row["family"],
        row["mode"],
        str(row["head_dim"]),
        str(row["rewritten"]),
        f"{row['outputs'][1]:.1e} ({row['outputs_ratio']:.2f} x)",
        f"{row['gradients'][1]:.1e} ({row['gradients_ratio']:.2f} x)",
        f"{row['worst_parameter_ratio']:.2f} x",
        verdict,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--out", type=Path, default=RESULTS / "families.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(arguments.family):
        for mode in arguments.mode:
            # heads of 64 and 128, and eval and train, in turn: each family meets both
            scale = (SCALE, WIDE_HEADS)[(number + len(rows)) % 2]
            rows.append(attempt(name, mode, scale, train=len(rows) % 2 == 0))
            print(name, mode, rows[-1]["faults"] or "holds", flush=True)
        write(arguments.out, {"device": device(), "rows": rows})
    headers = ("family", "dtype", "head", "sites", "outputs", "gradients", "worst parameter", "")
    title = f"Promise 6 on {device()}: error against float64 (x the original's)"
    show(title, headers, map(line, rows))
    failed = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
