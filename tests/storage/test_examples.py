"""The examples run, and loading leaves PyTorch and transformers as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import liger_fx
from liger_fx.errors import LoadError
from tests.storage.files import ROOT, edit
from tests.support.families import build
from tests.support.untouched import Untouched


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, result", [("save_and_load", ""), ("export", "llama.pt2"), ("reports", "")]
)
def test_examples_run(name: str, result: str, tmp_path: Path) -> None:
    command = [sys.executable, f"examples/{name}.py", str(tmp_path / result)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {
        "save_and_load": "LoadError: graph.json.blocks[",
        "export": "transformers was imported: False",
        "reports": "exit code 1",
    }
    assert [key for key, text in said.items() if text in done.stdout] == [name]


def test_nothing_is_altered_by_saving_loading_and_failing_to(saved: Path, tmp_path: Path) -> None:
    model = build("llama", num_hidden_layers=1)
    opt = liger_fx.load(saved, model=model)  # what is imported on the way is imported now
    before = Untouched(model)
    liger_fx.load(saved)
    liger_fx.load(saved, model=model)
    liger_fx.save(opt, tmp_path / "again")
    edit(saved / "config.json", lambda c: c.update(num_hidden_layers=50_000))
    with pytest.raises(LoadError):
        liger_fx.load(saved)
    assert before.changes() == []
