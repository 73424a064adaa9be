"""Draws small modules, optimises them, and calls them in many ways beside the original.

    python -m tools.fuzz_traces --runs 20000 --out tools/bench/results/fuzz_traces.json

A module is Python source, drawn from a grammar of what docs/soundness.md speaks of: sizes as
Python's numbers, classes and identity, containers, conditions, attributes, modules that are not
followed, blocks in a ModuleList, writes in place, dropout, errors that are caught. It is called
with other sizes, dtypes, modes and arguments than it was traced with. Outputs by class and value,
gradients and errors must be the original's, or a LigerFxError or FallbackWarning says that no
graph gave them. With ``--out`` of an earlier run that run goes on; ``--show`` prints the module of
a seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import liger_fx
from liger_fx.errors import FallbackWarning, LigerFxError

SAVE_EVERY = 25

# -- the grammar -----------------------------------------------------------------------------------

_HEADER = """
import collections, dataclasses, enum, math
from typing import Any, NamedTuple
import torch
import torch.nn.functional as F
from torch import nn
class Kind(enum.Enum):
    A = 1
    B = 2
class Pair(NamedTuple):
    h: Any
    n: Any = None
@dataclasses.dataclass
class Held:
    h: Any
    n: Any = None
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(8, 8), nn.RMSNorm(8), nn.Dropout(0.5)
    def forward(self, h, scale=1, flag=None):
        {layer}
        return {layer_result}
class Opaque(nn.Module):
    def forward(self, h):
        if h.abs().max() > 1e6:
            return h * 0
        return {opaque}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(8, 8), nn.RMSNorm(8), nn.Dropout(0.5)
        self.opaque, self.scale, self.table = Opaque(), 0.5, [1.0, 2.0, 3.0]
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.register_buffer("positions", torch.arange(8.0))
    def forward(self, x, y=None, flag=None, **options):
        h = self.lin(x.to(self.lin.weight.dtype))
"""
_SIZE = ["x.shape[0]", "h.shape[0]", "len(x)", "(h.size(0) + 1)", "(x.numel() // 8)", "x.shape[-1]"]
_NUMBER = [
    "{size}", "{size} / 4", "len(str({size}))", 'int(f"{{{size}}}")', "({size} % 3 + 1)",
    "{{4: 2, 6: 3}}.get({size}, 5)", "(2 if isinstance({size}, int) else 3)", "self.scale",
    "(2 if type({size}) is int else 3)", "math.sqrt({size})", "sum(range({size}))", "self.table[0]",
    "(2 if {size} in (4, 5) else 3)", "(2 if {size} in {{4, 5}} else 3)", "divmod({size}, 3)[1]",
    "(2 if self.training else 3)", "(2 if type(x) is torch.Tensor else 3)", "len(options)",
    "(2 if isinstance(x, nn.Parameter) else 3)", "(2 if y is x else 3)", "h.dim()", "({size} > 4)",
    "(2 if x.is_contiguous() else 3)", "{size}.bit_length()",
    "(2 if h.dtype == torch.float32 else 3)",
    "(2 if torch.is_grad_enabled() else 3)", "(2 if self.lin.weight.requires_grad else 3)",
    "(2 if flag else 3)", "(1 if flag is None else 2)", "list(options).index('b') if 'b' in options"
    " else 1", "(2 if h.float() is h else 3)", "round({size} / 3)",
    "hash({size})", "min({size}, 5)",
]  # fmt: skip
_TENSOR = [
    "self.lin(h)", "self.norm(h)", "h + 1", "h * {number}", "h + self.positions", "self.drop(h)",
    "F.dropout(h, 0.5, self.training)", "F.silu(h) * h", "h.squeeze(0)", "h[:3]", "h.flip(0)",
    "h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm.weight", "h.cumsum(0)",
    "torch.cat(h.split(4))", "h.reshape(-1, 8)", "h + torch.ones(h.shape[0], 1)", "h.double()",
    "h - h.mean(0)", "sum(i * c.sum(0) for i, c in enumerate(h.chunk(3)))", "h.to(torch.float32)",
]  # fmt: skip
_STATEMENT = [
    "h = {tensor}", "h = {tensor}", "h = {tensor}", "h = h * {number}", "h = h * {number}",
    "if {size} > 4: h = {tensor}", "if flag: h = {tensor}", "if y is not None: h = h + y.mean()",
    "h = h.clone(); h.mul_({number})", "h = h + 0; h[:1] = 0", "h = h * 1; h += 1",
    "for layer in self.layers: h = layer(h)", "for layer in self.layers: h = layer(h, {number})",
    "for i, layer in enumerate(self.layers): h = layer(h, flag=i)",
    "h = self.opaque(h)", "o = self.opaque(h); h = o * o.shape[-1]", "o = self.opaque(h); h = o *"
    " o.shape[0]", "seen = [h]; seen.append({tensor}); h = sum(seen)",
    "held = {{'a': h, 'b': {tensor}}}; h = held['a'] + held['b']",
    "for key, value in options.items(): h = h * value",
    "with torch.no_grad(): h = {tensor}",
    "try: h = h + x[5].mean()\n        except IndexError: h = h * 2",
    "try: h = {tensor}\n        except (RuntimeError, IndexError): h = h * 2",
    "pair = Pair(h, {number}); h = pair.h * pair.n",
    "held = Held(h, {number}); h = held.h * held.n",
    "memo = {{id(x): h}}; h = memo[id(x)]", "h = {{x: h}}[x]", "first, *_ = h; h = h + first",
    "self.last = h", "h = h + sum(row.sum() for row in h)", "assert {size} > 0",
]  # fmt: skip
_RESULT = [
    "h", "h", "h", "(h, {number})", "[h, {tensor}]", "{{'h': h, 'n': {size}}}", "{{Kind.A: h}}",
    "Pair(h, {size})", "Held(h, [h])", "(h, x.shape)", "{{('a', 1): h, 2: None}}", "h.max(-1)",
    "collections.OrderedDict(h=h)", "(h, None, Kind.B)", "{{f'n{{{size}}}': h}}", "[[h], (h,)]",
]  # fmt: skip
_OPAQUE = ["h * 2", "h[:2]", "h[h.sum(-1) > 0]", "torch.cat([h, h])", "h[..., :4]", "h.double()",
           "h if h.sum() > 0 else h.double()", "h"]  # fmt: skip
_LAYER = ["h = h + self.norm(self.lin(h))", "h = self.drop(h)", "h = h * scale",
          "h = h + h.shape[0]",
          "h = h * (2 if flag else 3)", "h = h * (2 if flag == 1 else 3)",
          "h = h.squeeze(0)"]  # fmt: skip


def source_of(rng: random.Random) -> str:
    """The source of one module."""

    def fill(text: str) -> str:
        parts = {"size": _SIZE, "number": _NUMBER, "tensor": _TENSOR}
        while (name := next((n for n in parts if f"{{{n}}}" in text), None)) is not None:
            text = text.replace(f"{{{name}}}", rng.choice(parts[name]), 1)
        return text.replace("{{", "{").replace("}}", "}")

    layer = "; ".join(rng.sample(_LAYER, rng.randrange(1, 3)))
    header = _HEADER.format(
        layer=layer, layer_result=rng.choice(["h", "h", "h * 1"]), opaque=rng.choice(_OPAQUE)
    )
    body = [fill(rng.choice(_STATEMENT)) for _ in range(rng.randrange(1, 5))]
    body.append(f"return {fill(rng.choice(_RESULT))}")
    return header + "".join(f"        {line}\n" for line in body)


@contextmanager
def module_of(source: str) -> Iterator[Any]:
    """The Python module of this source, which can be imported within."""
    home = types.ModuleType("fuzzed")
    sys.modules[home.__name__] = home
    try:
        exec(compile(source, "<fuzz>", "exec"), vars(home))
        yield home
    finally:
        del sys.modules[home.__name__]


# -- calls -----------------------------------------------------------------------------------------


def call_of(rng: random.Random, seed: int) -> dict[str, Any]:
    """The arguments of one call, by name in some order, its modes and its first grad mode."""
    draw = torch.Generator().manual_seed(seed)
    rows = rng.choice([4, 4, 4, 6, 1, 9])
    x: Any = torch.randn(rows, 8, generator=draw)
    form = rng.randrange(12)
    if form == 0:
        x = torch.randn(8, rows, generator=draw).t()
    elif form == 1:
        x = x.double()
    elif form == 2:
        x = nn.Parameter(x)
    arguments: dict[str, Any] = {"x": x}
    if rng.random() < 0.3:
        arguments["y"] = rng.choice([x, None, torch.randn(rows, 8, generator=draw)])
    if rng.random() < 0.3:
        arguments["flag"] = rng.choice([True, False, None, 1, 0.0])
    if rng.random() < 0.2:
        names = rng.sample("ab", rng.randrange(1, 3))
        arguments |= {name: rng.choice([2, 3.0]) for name in names}
    return {"arguments": arguments, "train": rng.random() < 0.3, "grad": rng.random() < 0.8}


def parts_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """A result as its classes and values, from the outside in."""
    yield type(value), None
    if isinstance(value, torch.Tensor):
        yield (value.dtype, tuple(value.shape), value.requires_grad), value
    elif isinstance(value, dict):
        yield list(value), None
        for item in value.values():
            yield from parts_of(item)
    elif isinstance(value, (list, tuple)):
        yield len(value), None
        for item in value:
            yield from parts_of(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from parts_of(getattr(value, name))
    else:
        yield repr(value), None


def run(model: Any, call: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What a call gives, and the gradients of the sum of all that is differentiable in it; an error
    by its class."""
    model.zero_grad()
    model.train(call["train"])
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(call["grad"]):
            found = list(parts_of(model(**call["arguments"])))
    except LigerFxError:
        raise
    except Exception as error:
        return [(type(error), None)]
    sums = [t.float().sum() for _, t in found if t is not None and t.requires_grad]
    if sums and call["grad"]:
        torch.stack(sums).sum().backward()
    grads = [(name, p.grad) for name, p in model.named_parameters()]
    return found + [(name, None if g is None else g.clone()) for name, g in grads]


def difference(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> str:
    """In what two runs differ; "" if in nothing."""
    ours, theirs = [fact for fact, _ in found], [fact for fact, _ in expected]
    if ours != theirs:
        pairs = zip(ours, theirs, strict=False)
        at = next((f"{a} is not {b}" for a, b in pairs if a != b), "another number of parts")
        return f"parts: {at}"
    for (fact, a), (_, b) in zip(found, expected, strict=True):
        if (a is None) != (b is None):
            return f"{fact}: only one is there"
        if a is not None and not torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True):
            return f"{fact}: {a.flatten()[:2].tolist()} is not {b.flatten()[:2].tolist()}"
    return ""


# -- the runs --------------------------------------------------------------------------------------


def outcome_of(seed: int) -> tuple[str, str]:
    """What became of the module of this seed: "right", "told" or "wrong", and how wrong."""
    rng = random.Random(seed)
    source = source_of(rng)
    calls = [call_of(rng, seed + i) for i in range(6)]
    with module_of(source) as home:
        torch.manual_seed(seed)
        return _compared(home.Model(), calls)


def _compared(original: Any, calls: list[dict[str, Any]]) -> tuple[str, str]:
    kind = run(copy.deepcopy(original), calls[0])[0][0]
    if issubclass(kind, Exception):
        return "no example", ""
    given, told = copy.deepcopy(original), False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given.train(calls[0]["train"])
        try:
            with torch.set_grad_enabled(calls[0]["grad"]):
                opt = liger_fx.optimize(given, calls[0]["arguments"])
        except LigerFxError:
            return "told", ""
        except Exception as error:
            return "wrong", f"optimize: {type(error).__name__}: {error!s:.200}"
        for i, call in enumerate(calls):
            expected = run(original, call)
            try:
                found = run(opt, call)
            except LigerFxError:
                told = True
                continue
            if how := difference(found, expected):
                shown = {k: getattr(v, "shape", v) for k, v in call["arguments"].items()}
                return "wrong", f"call {i}, {shown} {call['train']} {call['grad']}: {how:.300}"
        told |= any(issubclass(warning.category, FallbackWarning) for warning in caught)
    return ("told" if told else "right"), ""


def fuzz(
    first: int, runs: int, record: dict[str, Any], out: Path | None = None, processes: int = 1
) -> None:
    """So many modules from this seed on; ``record`` counts what became of them."""
    outcomes = Counter(record.get("outcomes", {}))
    start, spent = time.perf_counter(), record.get("seconds", 0.0)
    failures = record.setdefault("failures", [])
    seeds = range(first, first + runs)
    for seed, (outcome, how) in zip(seeds, _outcomes(seeds, processes), strict=True):
        outcomes[outcome] += 1
        if how:
            failures.append({"seed": seed, "what": how})
        record |= {
            "runs": outcomes.total(),
            "next": seed + 1,
            "seconds": round(spent + time.perf_counter() - start, 1),
            "outcomes": dict(outcomes.most_common()),
        }
        if out is not None and (seed + 1 - first) % SAVE_EVERY == 0:
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _outcomes(seeds: range, processes: int) -> Iterator[tuple[str, str]]:
    if processes == 1:
        yield from map(outcome_of, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap(outcome_of, seeds, chunksize=8)


def main() -> int:
    """Fuzz, print a summary, write the result; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=300, help="how many modules in all")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--out", type=Path, help="write the result to this file, or go on with it")
    parser.add_argument("--processes", type=int, default=1, help="how many at a time")
    parser.add_argument("--show", type=int, help="print the module of this seed and what it does")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.show is not None:
        print(source_of(random.Random(arguments.show)))
        print(*outcome_of(arguments.show))
        return 0
    out: Path | None = arguments.out
    earlier = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    record: dict[str, Any] = {"seed": arguments.seed, **earlier.get("results", earlier)}
    left = arguments.runs - record.get("runs", 0)
    fuzz(record.get("next", record["seed"]), left, record, out, arguments.processes)
    print(json.dumps(record, indent=1))
    if out is not None:
        from tools.bench.common import write

        write(out, record)
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
