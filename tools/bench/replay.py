"""The time of GPU work without the launches from Python: captured in a CUDA graph, then replayed.

seconds_per_call([lambda: f(a), lambda: f(b), ...])  ->  seconds per call of f, as a median
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

REPEATS = 5
SECONDS = 0.04  # of each repeat


def seconds_per_call(calls: Sequence[Callable[[], Any]], seconds: float = SECONDS) -> float:
    """Seconds that one of `calls` takes on the GPU, all captured in one graph, in turn: the median
    of REPEATS measurements, each of about `seconds`.

    Their inputs together should exceed the GPU's cache, or the cache is what is timed. What they
    return is kept until the end, so that each writes to memory of its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes the libraries' handles
        for call in calls:
            call()
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    once = _timed(graph, 2)
    replays = max(2, round(seconds / once))
    times = [_timed(graph, replays) for _ in range(REPEATS)]
    del kept
    return median(times) / len(calls)


def _timed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Seconds per replay, one replay having run before."""
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / replays


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 2 GiB, read and written bytes both counted.

    The faster of PyTorch's copy and of a kernel that reads and writes each element, both launched,
    not replayed: in a CUDA graph a copy becomes a memcpy node, which is slower than either, and at
    this size a launch takes no time that shows.
    """
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.mul(source, 1, out=target))
    return 2 * source.nbytes / min(map(_launched, copies))


def _launched(call: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of a call that is launched from Python, the median."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)
