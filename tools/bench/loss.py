"""The loss of a language model's head alone: time, memory and error, beside its bare products.

    python tools/bench/loss.py  ->  results/loss.json and a table

8192 rows in bfloat16, vocabulary 128256, forward and backward: the median of ten calls, the memory
that a call takes at most beside its inputs (gradients included), and the relative error of the
gradients against float64, for labels drawn evenly and as words of a text are (Zipf's law). Each
variant runs in a process of its own. "ours N": in chunks of N rows, whatever the cost model says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, run_child, show, write

ROWS, VOCAB, WIDTHS = 8192, 128256, (2048, 4096)
CHUNKS = (512, 768, 1024, 1536, 2048, 2560, 4096, 8192)
VARIANTS = ("products", "eager", "liger-kernel", "ours", *(f"ours {n}" for n in CHUNKS))
LABELS = ("even", "zipf")
CALLS, CHILD_LIMIT_S = 10, 120
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def inputs(width: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, weight and labels; h's rows have a part in common, as those of a trained model."""
    torch.manual_seed(0)
    h = torch.randn(ROWS, width, device="cuda") + 0.5 * torch.randn(width, device="cuda")
    weight = torch.randn(VOCAB, width, device="cuda") * 0.02
    chances = torch.ones(VOCAB, device="cuda")
    if kind == "zipf":
        chances /= torch.arange(1, VOCAB + 1, device="cuda")
    labels = torch.multinomial(chances, ROWS, replacement=True)
    return h.bfloat16(), weight.bfloat16(), labels


def eager(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, weight).float(), labels)


def function_of(variant: str) -> Loss:
    """The loss in one variant; ImportError where its package is not installed."""
    if variant == "eager":
        return eager
    if variant == "liger-kernel":
        theirs = import_module("liger_kernel.transformers.functional")
        return lambda h, w, y: theirs.liger_fused_linear_cross_entropy(h, w, y)
    from liger_fx.kernels import linear_cross_entropy as ours

    if variant != "ours":
        rows = int(variant.split()[1])
        ours.chunk_rows = lambda *args: rows  # type: ignore[assignment]
    return lambda h, w, y: ours.linear_cross_entropy(h, w, y)


def products(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    """What no variant can do without."""
    logits = h @ weight.t()
    logits @ weight
    logits.t() @ h


def trained(loss: Loss) -> Callable[..., None]:
    """Forward and backward; the gradients are let go."""

    def call(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
        loss(h, weight, labels).backward()
        h.grad = weight.grad = None

    return call


def measure(call: Callable[..., None], given: Any) -> dict[str, float]:
    for _ in range(3):
        call(*given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(*given)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    extra = torch.cuda.max_memory_allocated() - before
    return {"seconds": statistics.median(seconds), "gib": extra / 2**30}


def exact_gradients(
    h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, 256 rows at a time."""
    wide, dw = weight.double(), torch.zeros(weight.shape, device="cuda", dtype=torch.float64)
    parts = []
    for rows, marks in zip(h.double().split(256), labels.split(256), strict=True):
        grad = torch.softmax(rows @ wide.t(), -1)
        grad[torch.arange(len(marks), device="cuda"), marks] -= 1
        grad /= ROWS
        dw.addmm_(grad.t(), rows)
        parts.append(grad @ wide)
    return torch.cat(parts), dw


def errors(loss: Loss, width: int) -> dict[str, dict[str, float]]:
    """The relative error of h's and of the weight's gradient, for each kind of labels."""
    found = {}
    for kind in LABELS:
        h, weight, labels = inputs(width, kind)
        leaves = h.requires_grad_(), weight.requires_grad_()
        grads = torch.autograd.grad(loss(h, weight, labels), leaves)
        exact = exact_gradients(h.detach(), weight.detach(), labels)
        found[kind] = {
            name: ((g.double() - e).norm() / e.norm()).item()
            for name, g, e in zip(("dh", "dw"), grads, exact, strict=True)
        }
        del h, weight, leaves, grads, exact
        torch.cuda.empty_cache()
    return found


def child(variant: str, width: int) -> dict[str, Any]:
    h, weight, labels = inputs(width, "even")
    if variant == "products":
        return measure(products, (h, weight, labels))
    loss = function_of(variant)
    found: dict[str, Any] = measure(
        trained(loss), (h.requires_grad_(), weight.requires_grad_(), labels)
    )
    del h, weight, labels
    return {**found, "errors": errors(loss, width)}


def print_results(results: dict[str, dict[str, Any]]) -> None:
    for width, found in results.items():
        bare = found.get("products", {}).get("seconds", float("nan"))
        plain = found.get("eager", {}).get("errors")
        table = [_row(name, one, bare, plain) for name, one in found.items()]
        headers = ("variant", "ms", "x products", "extra GiB")
        titles = [f"{grad} error, {kind}, x eager" for kind in LABELS for grad in ("dh", "dw")]
        show(f"{ROWS} rows, vocabulary {VOCAB}, width {width}", (*headers, *titles), table)


def _row(name: str, one: dict[str, Any], bare: float, plain: Any) -> tuple[Any, ...]:
    if "error" in one:
        return name, one["error"].splitlines()[-1][:60]
    made = one.get("errors")
    ratios = (
        [f"{made[kind][g] / plain[kind][g]:.2f}" for kind in LABELS for g in ("dh", "dw")]
        if made and plain
        else []
    )
    seconds = one["seconds"]
    return name, f"{1e3 * seconds:.1f}", f"{seconds / bare:.2f}", f"{one['gib']:.2f}", *ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS / "loss.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "WIDTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("loss.py needs a CUDA device", file=sys.stderr)
        return 2
    if arguments.child:
        print(json.dumps(child(arguments.child[0], int(arguments.child[1]))))
        return 0
    results: dict[str, dict[str, Any]] = {}
    for width in arguments.widths:
        found = results[str(width)] = {}
        for variant in arguments.variants:
            print(f"==> {variant}, width {width}", flush=True)
            found[variant] = run_child(__file__, variant, str(width), timeout_s=CHILD_LIMIT_S)
            write(arguments.out, results)
    print_results(results)
    return int(any("error" in found.get("ours", {}) for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
