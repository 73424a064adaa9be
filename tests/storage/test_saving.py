"""Saving is whole or not at all: failing writes, crashes, directories that hold something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import liger_fx
from liger_fx.errors import SaveError, UsageError
from liger_fx.model.block import Block
from liger_fx.storage import directory
from tests.storage.files import ROOT, contents
from tests.support.families import build


class Disk:
    """Counts what is written, and fails before a file, or in the middle of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes, self.full_at = 0, -1
        original, save_file = directory.write_file, safetensors.torch.save_file

        def write_file(path: Path, data: bytes) -> None:
            for full in (self._is_full(), self._is_full()):
                if full:
                    raise OSError(28, "No space left on device")
                path.write_bytes(b"half")
            path.unlink()
            original(path, data)

        def save(tensors: Any, path: Path, metadata: Any) -> None:
            for full in (self._is_full(), self._is_full()):
                if full:
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
                path.write_bytes(b"half")
            save_file(tensors, path, metadata)

        monkeypatch.setattr("liger_fx.storage.save.write_file", write_file)
        monkeypatch.setattr("liger_fx.storage.tensors.save_file", save)

    def _is_full(self) -> bool:
        self.writes += 1
        return self.writes == self.full_at


@pytest.mark.parametrize("over", [False, True], ids=["new", "over another"])
def test_a_full_disk_at_any_write_leaves_what_was_there(
    over: bool, llama: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "graph"
    if over:
        liger_fx.save(liger_fx.optimize(build("mistral")), folder)
    before = contents(tmp_path)
    disk = Disk(monkeypatch)
    liger_fx.save(llama, tmp_path / "counted")
    total = disk.writes
    assert total == 12  # of six files
    wanted = contents(tmp_path / "counted")
    directory.shutil.rmtree(tmp_path / "counted")
    for disk.full_at in range(1, total + 1):
        disk.writes = 0
        with pytest.raises(SaveError, match="No space left on device.*nothing there has changed"):
            liger_fx.save(llama, folder)
        assert contents(tmp_path) == before and (over or not folder.exists())
    disk.full_at = -1
    liger_fx.save(llama, folder)
    assert contents(folder) == wanted and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["sync", "_put_in_place", "_check_replaceable"])
def test_a_failing_step_leaves_what_was_there(
    name: str, saved: Path, llama: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved.parent)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(directory, name, fail)
    with pytest.raises((SaveError, OSError)):
        liger_fx.save(llama, saved)
    assert contents(saved.parent) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_without_an_exchange_two_renames_do_it(
    failing: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    before = contents(saved.parent)
    rename, calls = os.rename, []

    def fail_once(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        rename(a, b)

    other = liger_fx.optimize(build("mistral"))
    monkeypatch.setattr(directory.os, "rename", fail_once)
    with pytest.raises(SaveError):
        liger_fx.save(other, saved)
    assert contents(saved.parent) == before
    liger_fx.save(other, saved)
    assert type(liger_fx.load(saved)).__name__ == "MistralForCausalLM"
    assert [path.name for path in saved.parent.iterdir()] == ["llama"]


CRASH = """
import os, sys
import liger_fx.storage.directory as directory
import liger_fx
from liger_fx.tiny import tiny_model

opt = liger_fx.optimize(tiny_model("mistral", 1))
place, folder, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
original = getattr(directory, place)

def crash(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return original(*args)

setattr(directory, place, crash)
import liger_fx.storage.save
if place == "write_file":
    liger_fx.storage.save.write_file = crash
if place == "sync":  # of a file of tensors
    liger_fx.storage.tensors.sync = crash
liger_fx.save(opt, folder)
"""


@pytest.mark.parametrize(
    "place, count", [("write_file", 3), ("sync", 1), ("sync", 2), ("_put_in_place", 1)]
)
def test_a_killed_process_leaves_the_old_files_whole(place: str, count: int, saved: Path) -> None:
    before = contents(saved)
    command = [sys.executable, "-W", "ignore", "-c", CRASH, place, str(saved), str(count)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(saved) == before
    assert type(liger_fx.load(saved)).__name__ == "LlamaForCausalLM"


def test_a_save_replaces_an_earlier_one_whole(llama: Block, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    deep = liger_fx.optimize(build("qwen2"))
    deep(input_ids=torch.ones(1, 3, dtype=torch.long))
    liger_fx.save(deep, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    liger_fx.save(llama, folder)
    assert not (folder / "model-00001-of-00001.safetensors").exists()
    assert str(liger_fx.load(folder)) == str(llama)
    liger_fx.save(llama, folder, weights=False)
    assert not (folder / "model.safetensors").exists()


def test_the_loaded_model_does_not_need_its_directory(llama: Block, saved: Path) -> None:
    loaded = liger_fx.load(saved)
    before = {path: p.clone() for path, p in loaded.named_parameters()}
    liger_fx.save(liger_fx.optimize(build("mistral")), saved)
    assert all(torch.equal(p, before[path]) for path, p in loaded.named_parameters())


def test_a_directory_that_holds_something_else_is_refused(
    llama: Block, saved: Path, tmp_path: Path
) -> None:
    (saved / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    before = contents(tmp_path)
    for path, what in ((saved, "notes.txt"), (tmp_path / "other", "config.json")):
        with pytest.raises(SaveError, match=f"holds something else .{what}"):
            liger_fx.save(llama, path)
    with pytest.raises(SaveError, match="is a file"):
        liger_fx.save(llama, tmp_path / "file")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    liger_fx.save(llama, tmp_path / "empty")
    liger_fx.save(llama, tmp_path / "new" / "deeper")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "deeper")


def test_a_link_to_a_directory_stays_one(llama: Block, saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    liger_fx.save(liger_fx.optimize(build("mistral")), link)
    assert link.is_symlink()
    assert json.loads((saved / "config.json").read_text())["model_type"] == "mistral"


def test_what_is_no_optimised_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="what optimize"):
        liger_fx.save(build("llama"), tmp_path / "a")


def test_what_has_no_form_in_a_file(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"), blocks=())
    view = next(node for node in opt.graph.nodes if node.target == "view")
    view.target = "apply_"
    with pytest.raises(SaveError, match=rf"may not call apply_ \(node {view.name}\)"):
        liger_fx.save(opt, tmp_path / "a")
    view.target = "view"
    view.args = (view.args[0], object())
    with pytest.raises(SaveError, match="cannot hold a object"):
        liger_fx.save(opt, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_changed_config_or_module_is_refused_or_kept(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"))
    opt.model.layers[0].self_attn.scaling = 0.5
    with pytest.raises(SaveError, match="call it once"):
        liger_fx.save(opt, tmp_path / "a")
    opt(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(SaveError, match=r"layers\.0\.self_attn"):
        liger_fx.save(opt, tmp_path / "a")
    opt = liger_fx.optimize(build("llama"))
    opt.config.use_cache = False
    with pytest.raises(SaveError, match="call it once"):
        liger_fx.save(opt, tmp_path / "a")
    opt(input_ids=torch.ones(1, 3, dtype=torch.long))
    liger_fx.save(opt, tmp_path / "a")
    loaded = liger_fx.load(tmp_path / "a")
    assert loaded.config.use_cache is False and len(loaded.plans) == 1
