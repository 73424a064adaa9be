"""Fills the tables of README.md and docs/performance.md, and the outputs of the README's example.

<!-- table: training_step llama1b -->     the table of tools/bench/results/training_step.json
<!-- output: print(opt) -->               what that line of the example prints
<!-- output: print(opt.code) [3:7] -->    its first line, and these lines of it
<!-- output: $ liger-fx rules -->         what that command prints

python tools/readme_tables.py             writes both
python tools/readme_tables.py --check     fails if a table is not what its result file says
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from liger_fx.cli import main as main_command  # noqa: E402
from tools.bench.compile_time import shortest  # noqa: E402

RESULTS = ROOT / "tools" / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
MARKED = re.compile(r"(<!-- table: (\S+)((?: \S+)*?) -->\n).*?(<!-- end -->)", re.DOTALL)
PRINTED = re.compile(r"(<!-- output: (.*?) -->\n```\w*\n).*?(```\n<!-- end output -->)", re.DOTALL)
PIECE = re.compile(r" \[(\d+):(\d*)\]$")
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHOWN = ("Rules", "Refused", "Calls that", "Sites", "Blocks", "Relative")  # beginnings of sections
WIDTH = 100  # of the lines of code

Rows = list[tuple[Any, ...]]


def training_step(results: Any, model: str) -> tuple[tuple[str, ...], Rows]:
    """One row a variant of one model: time, tokens/s, memory."""
    rows = [row for row in results if row["model"] == model]
    speeds = {row["variant"]: row.get("tokens_per_s") for row in rows}
    headers = ("variant", "step", "tokens/s", "x eager", "peak memory")
    table: Rows = []
    for row in rows:
        if "error" in row:
            table.append((row["variant"], "failed", "", "", ""))
            continue
        speed = row["tokens_per_s"]
        times_eager = f"{speed / speeds['eager']:.2f}" if speeds.get("eager") else ""
        memory = f"{row['peak_gib']:.2f} GiB"
        step = f"{row['step_ms']:.1f} ms"
        table.append((row["variant"], step, f"{speed:,.0f}", times_eager, memory))
    return headers, table


def first_steps(results: Any) -> tuple[tuple[str, ...], Rows]:
    """One row a model and variant: seconds until the first step is done, and what a step takes."""
    rows: Rows = [
        (
            row["model"],
            row["variant"],
            f"{row['prepare_s']:.1f} s",
            f"{row['first_step_s']:.1f} s",
            f"{row['step_ms']:.1f} ms",
            f"{row['peak_gib']:.2f} GiB",
        )
        for row in results
    ]
    return ("model", "variant", "prepare", "first step", "step", "peak memory"), rows


def compile_time(results: Any) -> tuple[tuple[str, ...], Rows]:
    """One row a start: the shortest of each model's first steps."""
    rows: Rows = [
        (start, f"{original:.1f} s", f"{ours:.1f} s", f"{ours / original:.2f}")
        for start, original, ours in shortest(results)
    ]
    return ("process", "original", "liger_fx", "ratio"), rows


def shapes(results: Any) -> tuple[tuple[str, ...], Rows]:
    """One row a model and variant: time and memory."""
    rows: Rows = []
    for row in results:
        named = row["model"], row["variant"]
        if "error" in row:
            rows.append((*named, "failed", ""))
        else:
            rows.append((*named, f"{row['step_ms']:.1f} ms", f"{row['peak_gib']:.2f} GiB"))
    return ("model", "variant", "step", "peak memory"), rows


def calls(results: Any) -> tuple[tuple[str, ...], Rows]:
    """One row a module and variant: microseconds of a call."""
    rows: Rows = [
        (name, variant, *(f"{way[variant]:.0f} µs" for way in ways.values()))
        for name, ways in results.items()
        for variant in ways["no_grad"]
    ]
    return ("module", "variant", "no grad", "forward", "forward + backward"), rows


def decoding(results: Any) -> tuple[tuple[str, ...], Rows]:
    """One row a batch and variant: tokens/s."""
    rows: Rows = []
    for row in results:
        eager = next(r for r in results if r["batch"] == row["batch"])["tokens_per_s"]
        speed = row["tokens_per_s"]
        rows.append((row["variant"], row["batch"], f"{speed:.1f}", f"{speed / eager:.2f}"))
    return ("variant", "batch", "tokens/s", "x eager"), rows


def operators(results: Any, direction: str) -> tuple[tuple[str, ...], Rows]:
    """One row a case: percent of the copy bandwidth for each variant, and microseconds."""
    timed = results["times"]
    copy = max(result["copy"] for result in timed.values() if "copy" in result)
    names = dict.fromkeys(name for r in timed.values() for name in r.get("cases", {}))

    def cell(result: Any, name: str) -> str:
        case = result.get("cases", {}).get(name)
        if case is None or "error" in case:
            return "" if case is None else "failed"
        seconds = case["seconds"][direction]
        return f"{case['bytes'][direction] / seconds / copy:.0%}, {1e6 * seconds:.0f} µs"

    rows = [(name, *(cell(result, name) for result in timed.values())) for name in names]
    return ("operator, shape", *timed), rows


def trace_time(results: Any) -> tuple[tuple[str, ...], Rows]:
    """One row a depth: seconds to trace and rewrite, beside DynamoExporter's."""
    rows = [
        (
            row["layers"],
            f"{row['liger_fx_s']:.2f} s",
            f"{row['dynamo_exporter_s']:.2f} s",
            f"{row['ratio']:.2f}",
        )
        for row in results["table"]
    ]
    return ("layers", "liger_fx.optimize", "DynamoExporter.export", "ratio"), rows


TABLES: dict[str, Callable[..., tuple[tuple[str, ...], Rows]]] = {
    "training_step": training_step,
    "training_workloads": training_step,
    "training_experts": training_step,
    "first_step": first_steps,
    "first_step_experts": first_steps,
    "first_step_compiled": first_steps,
    "first_step_compiled_dynamic": first_steps,
    "compile_time": compile_time,
    "compile_time_gpu": compile_time,
    "training_shapes": shapes,
    "training_peers": shapes,
    "training_checkpointed": shapes,
    "calls": calls,
    "decoding": decoding,
    "decoding_dynamic": decoding,
    "decoding_static": decoding,
    "operators": operators,
    "trace_time": trace_time,
}


def filled(text: str) -> str:
    """The page with every marked table made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{made(m[2], *m[3].split())}\n{m[4]}", text)


def made(name: str, *arguments: str) -> str:
    """One table in Markdown, with what it was measured on below it."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return f"Not measured yet: `python tools/bench/{name}.py` writes `{file.name}`."
    found = json.loads(file.read_text())
    headers, rows = TABLES[name](found["results"], *arguments)
    align = ["left"] + ["right"] * (len(headers) - 1)
    table = tabulate(rows, headers, "github", disable_numparse=True, colalign=align)
    machine = found["environment"]
    packages = (f"{package} {v}" for package, v in machine["versions"].items() if v)
    measured = f"{machine['gpu'] or machine['cpu']}, {', '.join(packages)}, {machine['date'][:10]}"
    return f"{table}\n\n{measured}; `{file.relative_to(ROOT).as_posix()}`"


def printed(text: str) -> str:
    """The page with the outputs of its example made anew: the first section, and those SHOWN."""
    if not PRINTED.search(text):
        return text
    code = EXAMPLE.search(text)
    assert code is not None
    said: list[str] = []
    scope: dict[str, Any] = {"print": lambda value: said.append(str(value))}
    exec(compile(code[1], "README.md", "exec"), scope)
    lines = re.findall(r"^(print\(.*\))(?:  #.*)?$", code[1], re.MULTILINE)
    known = dict(zip(lines, said, strict=True))  # what was printed then, whatever came after

    def output(line: str) -> str:
        if line.startswith("$ liger-fx "):
            return command_output(line.split()[2:])
        piece, shown = PIECE.search(line), PIECE.sub("", line)
        inner = shown.removeprefix("print(").removesuffix(")")
        value = (known[shown] if shown in known else str(eval(inner, scope))).strip()
        if inner.endswith((".code", ".graph")):
            return excerpt(value, piece)
        first, *rest = value.split("\n\n")
        return "\n\n".join([first, *(s for s in rest if s.startswith(SHOWN))]) + "\n"

    return PRINTED.sub(lambda m: f"{m[1]}{output(m[2])}{m[3]}", text)


def excerpt(code: str, piece: re.Match[str] | None) -> str:
    """Code in lines of the page's width: all of it, or the first line and a piece."""
    lines = [line if len(line) <= WIDTH else f"{line[: WIDTH - 2]} …" for line in code.split("\n")]
    if piece is None:
        return "\n".join(lines) + "\n"
    start, end = int(piece[1]), int(piece[2] or len(lines))
    after = ["    ..."] if end < len(lines) else []
    return "\n".join([lines[0], "    ...", *lines[start:end], *after]) + "\n"


def command_output(arguments: list[str]) -> str:
    """What a command of liger-fx prints on standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main_command(arguments)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text if check else printed(text))
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    said = ("stale" if check else "updated") if stale else "up to date"
    print(f"{said}: {', '.join(stale or [page.name for page in PAGES])}")
    return int(bool(stale) and check)


if __name__ == "__main__":
    raise SystemExit(main())
