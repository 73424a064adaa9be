"""Helpers of these tests: a directory's bytes, edits of JSON files, fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Read JSON, let ``change`` work on it in place (or return another value), write it back."""
    value = json.loads(file.read_text(encoding="utf-8"))
    changed = change(value)
    file.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def plan_in(document: Any, block: int = 0, plan: int = 0) -> Any:
    """The record of a graph."""
    return document["blocks"][block]["plans"][plan]


def guards_in(document: Any, block: int = 0, plan: int = 0) -> Any:
    """The record of when a graph may serve a call."""
    return plan_in(document, block, plan)["guards"]


def node(document: Any, name: str, plan: int = 0) -> Any:
    """The record of a node by its name, or by what it calls."""
    nodes = plan_in(document, plan=plan)["nodes"]
    return next(n for n in nodes if name in (n["name"], n["target"]))


def run_python(code: str, *arguments: object) -> Any:
    """What ``code`` prints as JSON on its last line, run in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
