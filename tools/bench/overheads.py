"""What liger_fx itself costs on this CPU: checking the guards of a call, loading a saved graph.

    python tools/bench/overheads.py  ->  tools/bench/results/overheads.json and two tables

One thread, and the fastest of several measurements, for machines are busy. The guards of a Llama
are held against a call at two depths, beside a forward. Loading a saved graph of 32 layers, weights
included, stands beside optimising the same model. Widths are small: neither depends on them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import liger_fx
from tools.bench.common import RESULTS, show, write
from tools.bench.trace_time import llama

DEPTHS = (2, 128)
LAYERS = 32  # of the graph that is loaded


def fastest(function: Callable[[], object], number: int, repeat: int = 7) -> float:
    """Seconds a call, the best of `repeat` rows of `number` calls."""
    return min(timeit.repeat(function, number=number, repeat=repeat)) / number


def guards() -> list[dict[str, float]]:
    """Seconds to check that a graph serves a call, and for a forward, at each depth."""
    ids = torch.randint(0, 256, (1, 8))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = []
    for layers in DEPTHS:
        traced = liger_fx.trace(llama(layers))
        with torch.no_grad():
            traced(**call)
            check = fastest(lambda traced=traced: traced.serving(call), 300)  # type: ignore[misc]
            forward = fastest(lambda traced=traced: traced(**call), 3)  # type: ignore[misc]
        rows.append({"layers": layers, "check_s": check, "forward_s": forward})
    return rows


def loading() -> dict[str, float]:
    """Seconds to load a saved graph, and to optimise the model it is of; both warm."""
    with tempfile.TemporaryDirectory() as folder:
        liger_fx.save(liger_fx.optimize(llama(1)), f"{folder}/small")
        liger_fx.load(f"{folder}/small")
        model = llama(LAYERS)
        optimising = fastest(lambda: liger_fx.optimize(model), 1, 3)
        liger_fx.save(liger_fx.optimize(model), f"{folder}/graph")
        load = fastest(lambda: liger_fx.load(f"{folder}/graph"), 1, 3)
    return {"layers": LAYERS, "load_s": load, "optimise_s": optimising, "ratio": load / optimising}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS / "overheads.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checks, load = guards(), loading()
    write(arguments.out, {"guards": checks, "loading": load})
    rows = [
        (r["layers"], f"{1e6 * r['check_s']:.1f} µs", f"{r['check_s'] / r['forward_s']:.2%}")
        for r in checks
    ]
    show("Checking the guards of a call", ("layers", "a check", "of a forward"), rows)
    row = (load["layers"], f"{load['load_s']:.2f} s", f"{load['optimise_s']:.2f} s")
    show("Loading", ("layers", "load", "optimise", "ratio"), [(*row, f"{load['ratio']:.2f}")])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
