"""Everything that needs a GPU, in order, with time limits: one command, one folder of results.

    python tools/bench/gpu_session.py --out results/  ->  operators.json, families.json,
        training_step.json, train_on_text.json, train_on_text.png, session.log

Each job runs in a process of its own. One that fails or runs out of time leaves what it had written
and does not stop the next; the table at the end says how each went.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, child_env, show

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """A script of this folder; `{out}` in its arguments stands for the folder of results.

    limit_s: its share of the time, and more where the jobs before it needed less.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float


JOBS = (
    Job("operators", ("--out", "{out}/operators.json"), 240),
    Job("families", ("--out", "{out}/families.json"), 150),
    Job("training_step", ("--breakdown", "--out", "{out}/training_step.json"), 210),
    Job(
        "train_on_text",
        ("--out", "{out}/train_on_text.json", "--plot", "{out}/train_on_text.png"),
        90,
    ),
)


def run(job: Job, out: Path, extra: list[str], limit_s: float) -> tuple[str, float]:
    """Runs one job, its output going to the terminal and the log; says how it ended."""
    arguments = [argument.format(out=out) for argument in job.arguments]
    command = [sys.executable, "-u", str(HERE / f"{job.name}.py"), *arguments, *extra]
    begin = time.perf_counter()
    print(f"\n==> {job.name}, at most {limit_s:.0f} s", flush=True)
    with (out / "session.log").open("ab") as log:
        log.write(f"\n==> {' '.join(command)}\n".encode())
        log.flush()
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=child_env(), start_new_session=True
        )
        try:
            code = child.wait(timeout=limit_s)
            verdict = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the job and the processes that it started
            child.wait()
            verdict = f"stopped after {limit_s:.0f} s"
    return verdict, time.perf_counter() - begin


def tail(log: Path, start: int, lines: int = 45) -> str:
    """The last lines that were written to the log since `start`."""
    with log.open("rb") as file:
        file.seek(start)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def main() -> int:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--seconds", type=float, default=580, help="for everything together")
    parser.add_argument(
        "--models", nargs="+", default=["llama1b"], help="models of the training step"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    out, log = arguments.out.resolve(), arguments.out / "session.log"
    log.touch()
    rows, begin = [], time.perf_counter()
    chosen = [job for job in JOBS if job.name in arguments.only]
    for job in chosen:
        left = arguments.seconds - (time.perf_counter() - begin)
        # Its share, and what the jobs before it did not need
        limit_s = left - sum(later.limit_s for later in chosen[chosen.index(job) + 1 :])
        extra = ["--model", *arguments.models] if job.name == "training_step" else []
        start = log.stat().st_size
        verdict, seconds = run(job, out, extra, limit_s)
        print(tail(log, start), flush=True)
        rows.append((job.name, verdict, f"{seconds:.0f} s"))
    show("The session", ("job", "ended", "time"), rows)
    return int(any(verdict != "ok" for _, verdict, _ in rows))


if __name__ == "__main__":
    raise SystemExit(main())
