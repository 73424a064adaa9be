"""The operators on one GPU: right first, then fast, next to the others, by graph replay.

    python tools/bench/operators.py  ->  results/operators.json and tables

Each variant runs in a process of its own, because importing some of them changes what others
compute. Times hold no launches from Python. Percent: of the bandwidth of a large copy of the same
run, counting each input read once and each output written once (operator_cases.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write
from tools.bench.operator_cases import VARIANTS, Case, cases, function_of
from tools.bench.replay import copy_bandwidth, seconds_per_call

INPUT_BYTES = 400 * 2**20  # of all sets of inputs together: eight times an H100's cache
CHILD_LIMIT_S = 300


def time_case(case: Case, function: Callable[..., Any]) -> dict[str, Any]:
    """Seconds of the forward, and of forward and backward, with the bytes each must move."""
    leaves, constants = case.inputs()
    outputs = function(*leaves, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    forward_bytes, both_bytes = case.minimal_bytes(leaves, constants, outputs)
    sets = max(2, -(-INPUT_BYTES // sum(t.nbytes for t in leaves)))
    drawn = [case.inputs() for _ in range(sets)]
    grads = [tuple(torch.randn_like(out) for out in outputs) for _ in range(sets)]
    del leaves, constants, outputs

    def both(leaves: Any, constants: Any, grads: Any) -> Any:
        outputs = function(*leaves, *constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs, torch.autograd.grad(outputs, leaves, grads)

    seconds = {"forward": seconds_per_call([partial(function, *a, *b) for a, b in drawn])}
    for leaf in (x for leaves, _ in drawn for x in leaves):
        leaf.requires_grad_()
    calls = [partial(both, a, b, g) for (a, b), g in zip(drawn, grads, strict=True)]
    seconds["both"] = seconds_per_call(calls)
    return {"bytes": {"forward": forward_bytes, "both": both_bytes}, "seconds": seconds}


def child(job: str, only: list[str]) -> dict[str, Any]:
    """What one process does: the checks, the tuning, or the timing of one variant."""
    if job == "checks":
        from tools.bench.operator_checks import check_all

        return {"rows": check_all()}
    if job == "tune":
        from tools.bench.operator_tuning import tune

        return {"rows": tune(only)}
    if job == "liger-kernel" and find_spec("liger_kernel") is None:
        return {"error": "liger-kernel is not installed"}
    result: dict[str, Any] = {"copy": copy_bandwidth(), "cases": {}}
    for case in cases():
        function = function_of(case, job)
        if function is None or (only and case.operator not in only):
            continue
        try:
            result["cases"][case.name] = time_case(case, function)
        except Exception as error:  # one case must not hide the others
            result["cases"][case.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        torch.cuda.empty_cache()
    return result


def print_checks(rows: list[dict[str, Any]]) -> bool:
    """The table of the checks; whether all passed."""
    table = [(r["operator"], r["dtype"], r["cases"], f"{r['worst']:.2f}", r["where"]) for r in rows]
    show(
        "Relative error against float64, over its limit",
        ("operator", "dtype", "cases", "worst", "where"),
        table,
    )
    return all(r["worst"] <= 1 for r in rows)


def print_times(timed: dict[str, dict[str, Any]]) -> None:
    """One row per case and direction: percent of the copy bandwidth and microseconds."""
    copy = max((result["copy"] for result in timed.values() if "copy" in result), default=0.0)
    names = list(dict.fromkeys(n for r in timed.values() for n in r.get("cases", {})))
    for direction, title in (("forward", "Forward"), ("both", "Forward and backward")):
        table = [
            (name, *(_cell(result, name, direction, copy) for result in timed.values()))
            for name in names
        ]
        show(
            f"{title}: percent of the copy bandwidth ({copy / 1e9:.0f} GB/s), microseconds",
            ("case", *timed),
            table,
        )
    for variant, result in timed.items():
        errors = {n: c["error"] for n, c in result.get("cases", {}).items() if "error" in c}
        if "error" in result or errors:
            print(f"\n{variant}: {result.get('error') or errors}", flush=True)


def _cell(result: dict[str, Any], name: str, direction: str, copy: float) -> str:
    case = result.get("cases", {}).get(name)
    if case is None:
        return ""
    if "error" in case:
        return "failed"
    seconds = case["seconds"][direction]
    return f"{case['bytes'][direction] / seconds / copy:.0%} {1e6 * seconds:.1f}"


def print_tuning(rows: list[dict[str, Any]]) -> None:
    table = [
        (r["kernel"], r["case"], f"{r['own_us']:.1f}", f"{r['best_us']:.1f}", r["best"], r["next"])
        for r in rows
    ]
    print("\nLaunches are (rows, cols, warps, per_sm, stages)")
    show("Launches", ("kernel", "case", "now, us", "best, us", "best", "next"), table)


def run(job: str, only: list[str]) -> dict[str, Any]:
    print(f"==> {job}", flush=True)
    selection = ["--only", *only] if only else []
    return run_child(__file__, job, *selection, timeout_s=CHILD_LIMIT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS / "operators.json")
    known = [*dict.fromkeys(case.operator for case in cases()), "checks"]
    parser.add_argument("--only", nargs="+", default=[], choices=known)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tune", action="store_true", help="try other launches, time nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    operators = [name for name in arguments.only if name != "checks"]
    if not torch.cuda.is_available():
        print("operators.py needs a CUDA device", file=sys.stderr)
        return 2
    if arguments.child:
        print(json.dumps(child(arguments.child, operators)))
        return 0
    if arguments.tune:
        found = run("tune", operators)
        print(found["error"]) if "error" in found else print_tuning(found["rows"])
        write(arguments.out.with_name("operators_tuning.json"), found)
        return int("error" in found)
    results: dict[str, Any] = {"checks": run("checks", [])}
    checks = results["checks"]
    passed = "error" not in checks and print_checks(checks["rows"])
    if not passed:
        print(f"\nFAILED: {checks.get('error', 'an error above its limit')}", flush=True)
    if arguments.only != ["checks"]:
        results["times"] = {}
        for variant in arguments.variants:
            results["times"][variant] = run(variant, operators)
            write(arguments.out, results)
        print_times(results["times"])
    write(arguments.out, results)
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
