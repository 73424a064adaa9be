"""Tries other ways of spreading the kernels over the GPU than the ones the kernels choose.

    python tools/bench/operators.py --tune  ->  a table: per kernel and shape the choice, the best

The candidates are compiled by a pool of processes first, which fill Triton's cache, then timed one
after the other by graph replay.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from liger_fx.kernels.launch import Launch, power_of_two
from tools.bench.operator_cases import EPS, Case, cases
from tools.bench.replay import seconds_per_call

SECONDS = 0.01  # of each of the measurements of a candidate


@dataclass(frozen=True)
class Kernel:
    """A launch function, `module.chooser`, the operator it serves, and the candidates for it."""

    module: str
    chooser: str
    operators: tuple[str, ...]
    backward: bool
    candidates: Callable[[int], list[Launch]]  # of a case's width


def _tiles(width: int) -> Iterator[tuple[int, int]]:
    """(rows, cols) of the kernels of norms: a row whole, up to 8192 elements at once."""
    cols = power_of_two(width)
    for elements in (1024, 2048, 4096, 8192):
        if elements >= cols:
            yield elements // cols, cols


def _norm_forward(width: int) -> list[Launch]:
    return [Launch(*t, w) for t, w in product(_tiles(width), (2, 4, 8, 16, 32)) if _fits(t, w)]


def _norm_backward(width: int) -> list[Launch]:
    return [
        Launch(*tile, warps, per_sm, stages)
        for tile, warps, per_sm, stages in product(
            _tiles(width), (4, 8, 16, 32), (1, 2, 3, 4, 6, 8), (1, 2, 3, 4)
        )
        if _fits(tile, warps) and 8 <= warps * per_sm <= 32
    ]


def _fits(tile: tuple[int, int], warps: int) -> bool:
    """8 to 32 elements a thread: 16-byte loads, and no spilled registers."""
    return 8 <= tile[0] * tile[1] // (32 * warps) <= 32


def _gated(width: int) -> list[Launch]:
    return [Launch(1, cols, warps) for cols, warps in product((1024, 2048, 4096, 8192), (2, 4, 8))]


def _rope(width: int) -> list[Launch]:
    return [Launch(rows, 64, warps) for rows, warps in product((4, 8, 16, 32), (1, 2, 4, 8))]


NORMS = ("RMSNorm", "LayerNorm")
GATED = ("SwiGLU", "GEGLU")
KERNELS = (
    Kernel("norm", "forward_launch", NORMS, False, _norm_forward),
    Kernel("norm", "backward_launch", NORMS, True, _norm_backward),
    Kernel("gated_activation", "gated_launch", GATED, False, _gated),
    Kernel("gated_activation", "gated_launch", GATED, True, _gated),
    Kernel("rope", "rope_launch", ("RoPE",), False, _rope),
)


@contextmanager
def launched_as(kernel: Kernel, choice: Launch) -> Iterator[None]:
    module: Any = importlib.import_module(f"liger_fx.kernels.{kernel.module}")
    own = getattr(module, kernel.chooser)
    setattr(module, kernel.chooser, lambda *args: choice)
    try:
        yield
    finally:
        setattr(module, kernel.chooser, own)


def calls(case: Case, backward: bool, sets: int) -> list[Callable[[], Any]]:
    """The operator alone on `sets` sets of inputs: its forward, or its backward."""
    drawn = [case.inputs() for _ in range(sets)]
    if not backward:
        return [partial(case.functions["ours"], *leaves, *rest) for leaves, rest in drawn]
    ops = torch.ops.liger_fx
    activation = "silu" if case.operator == "SwiGLU" else "gelu_tanh"

    def call(dy: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> Any:
        if case.operator == "RMSNorm":
            return ops.rms_norm_backward(dy, *leaves, EPS, 0.0, True)
        if case.operator == "LayerNorm":
            return ops.layer_norm_backward(dy, *leaves, EPS, 0.0, True, True)
        return ops.gated_activation_backward(dy, *leaves, activation)

    return [partial(call, torch.randn_like(leaves[0]), leaves) for leaves, _ in drawn]


def _jobs() -> Iterator[tuple[int, int, list[Launch]]]:
    """(kernel, case, candidates), the first two as indices."""
    for k, kernel in enumerate(KERNELS):
        for c, case in enumerate(cases()):
            if case.operator in kernel.operators:
                yield k, c, kernel.candidates(case.width)


def compile_some(work: list[tuple[int, int, Launch]]) -> None:
    """Run each once: its machine code is then in Triton's cache on disk."""
    made: dict[tuple[int, int], Callable[[], Any]] = {}
    for k, c, launch in work:
        kernel = KERNELS[k]
        if (k, c) not in made:
            made.clear()
            made[k, c] = calls(cases()[c], kernel.backward, 1)[0]
        with launched_as(kernel, launch):
            try:
                made[k, c]()
            except Exception:  # too large for this GPU: the timing will say so
                continue
    torch.cuda.synchronize()


def tune(only: list[str]) -> list[dict[str, Any]]:
    """One row per kernel and shape: the kernel's own choice, the best found, and their times."""
    jobs = [job for job in _jobs() if not only or cases()[job[1]].operator in only]
    work = [(k, c, launch) for k, c, candidates in jobs for launch in candidates]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_some, [work[i::workers] for i in range(workers)]))
    return [_best(KERNELS[k], cases()[c], candidates) for k, c, candidates in jobs]


def _best(kernel: Kernel, case: Case, candidates: list[Launch]) -> dict[str, Any]:
    work = calls(case, kernel.backward, 3)
    own = seconds_per_call(work)
    times: dict[str, float] = {}
    for launch in candidates:
        with launched_as(kernel, launch):
            try:
                times[str(tuple(launch))] = seconds_per_call(work, SECONDS)
            except Exception as error:
                times[f"{tuple(launch)}: {type(error).__name__}"] = float("inf")
    ranked = sorted(times.items(), key=lambda item: item[1])
    return {
        "kernel": f"{kernel.module}.{kernel.chooser}{' backward' if kernel.backward else ''}",
        "case": case.name,
        "own_us": 1e6 * own,
        "best_us": 1e6 * ranked[0][1],
        "best": ranked[0][0],
        "next": [(name, round(1e6 * seconds, 1)) for name, seconds in ranked[1:6]],
    }
