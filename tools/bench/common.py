"""What the benchmarks share: a record of the machine, result files, tables, and child processes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PLACES = ("--out", "--plot")  # options that say where results go
PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def environment() -> dict[str, Any]:
    """Date, command, versions and hardware: what a reader needs to judge or repeat a result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": _command(),
        "gpu": gpu,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _command() -> str:
    """How this script was called, but for where it and its results lie on this machine."""
    script, *arguments = sys.argv
    shown, skip = [], False
    for argument in arguments:
        if not skip and argument not in PLACES:
            shown.append(argument)
        skip = argument in PLACES
    return " ".join(["python", Path(script).resolve().relative_to(ROOT).as_posix(), *shown])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path, results: Any) -> None:
    """Writes `results` beside the machine's record, as indented JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


def show(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a titled table."""
    print(f"\n{title}\n{tabulate(rows, headers=headers, tablefmt='github')}", flush=True)


def run_child(
    script: str, *arguments: str, timeout_s: float, cache: str | None = None
) -> dict[str, Any]:
    """Runs `python script --child ...` in a process of its own and reads the JSON of its last line.
    What it compiles is kept in the folder `cache`, by default where it always is.

    A child that fails or runs out of time gives {"error": ...}: one must not hide the others.
    """
    command = [sys.executable, script, "--child", *arguments]
    env = child_env()
    if cache is not None:
        env |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = (done.stderr or done.stdout).strip().splitlines()[-12:]
        return {"error": "\n".join(tail) or f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def child_env() -> dict[str, str]:
    """This process's environment, with the repository importable."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}
