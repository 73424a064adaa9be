"""A save during a load, saves that crashed, modes of directories."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import liger_fx
from liger_fx.errors import LoadError
from liger_fx.model.block import Block
from liger_fx.storage import directory, skeleton
from liger_fx.storage.stored import Stored
from tests.storage.files import contents
from tests.support.families import build


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has something happen once, between a load's look at the files and its reading them."""

    def set_up(happen: Any) -> None:
        original, pending = skeleton.from_config, [happen]

        def from_config(saved: Any) -> Any:
            while pending:
                pending.pop()()
            return original(saved)

        monkeypatch.setattr(skeleton, "from_config", from_config)

    return set_up


@pytest.mark.parametrize("replacement", ["llama", "mistral"])
def test_a_save_during_a_load_is_noticed(replacement: str, saved: Path, during: Any) -> None:
    other = liger_fx.optimize(build(replacement, num_hidden_layers=1, seed=9))
    during(lambda: liger_fx.save(other, saved))
    with pytest.raises(LoadError, match=r"llama: was replaced while it was read: load it again"):
        liger_fx.load(saved)
    again = liger_fx.load(saved)
    for ours, theirs in zip(again.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_checkpoint_that_changes_during_a_load_is_noticed(
    how: str, llama: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger_fx.save(llama, tmp_path / "bare", weights=False)
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    changed = {name: t + 1 for name, t in safetensors.torch.load_file(file).items()}

    def change() -> None:
        if how == "in place":
            file.write_bytes(safetensors.torch.save(changed))
            os.utime(file, (1, 1))
        else:
            safetensors.torch.save_file(changed, tmp_path / "new")
            os.replace(tmp_path / "new", file)

    original = Stored.read  # right after the checkpoint was looked into
    monkeypatch.setattr(Stored, "read", lambda *args: (change(), original(*args))[1])
    with pytest.raises(LoadError, match=r"model\.safetensors.*while it was read"):
        liger_fx.load(tmp_path / "bare", checkpoint=tmp_path / "checkpoint")


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770, 0o755])
def test_the_mode_of_a_directory_stays(mode: int, llama: Block, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    for _ in range(2):  # an empty one, and an earlier save
        folder.chmod(mode)
        liger_fx.save(llama, folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode


def test_nobody_else_can_look_in_while_it_is_written(
    llama: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir(mode=0o700)
    seen = []
    original = liger_fx.storage.save.write_file

    def write_file(path: Path, data: bytes) -> None:
        seen.append(stat.S_IMODE(path.parent.stat().st_mode))
        original(path, data)

    monkeypatch.setattr("liger_fx.storage.save.write_file", write_file)
    liger_fx.save(llama, folder)
    assert set(seen) == {0o700}


def test_a_new_directory_obeys_the_umask(llama: Block, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        liger_fx.save(llama, tmp_path / "graph")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "graph").stat().st_mode) == 0o750


LOCKED = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_what_crashed_saves_left_is_removed(llama: Block, tmp_path: Path) -> None:
    names = [".graph.0000000a.new", ".graph.0000000b.new", ".graph.0000000c.new",
             ".graph.0000000d.new", ".other.0000000e.new"]  # fmt: skip
    abandoned, recent, foreign, held, other = (tmp_path / name for name in names)
    for folder in (abandoned, recent, foreign, held, other):
        folder.mkdir()
        (folder / ("notes.txt" if folder is foreign else "graph.json")).write_text("{}")
        if folder is not recent:
            for path in (*folder.iterdir(), folder):
                os.utime(path, (time.time() - 4000,) * 2)
    command = [sys.executable, "-c", LOCKED, str(held)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        liger_fx.save(llama, tmp_path / "graph")
        assert {p.name for p in tmp_path.iterdir()} == {*names[1:], "graph"}
        holder.kill()
    liger_fx.save(llama, tmp_path / "graph")
    assert not held.exists() and recent.exists() and foreign.exists() and other.exists()
    assert contents(tmp_path / "graph")


def test_a_save_holds_what_it_writes(
    llama: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def sync(folder: Path) -> None:
        seen.append((folder.name, directory._is_held(folder)))

    monkeypatch.setattr(directory, "sync", sync)
    liger_fx.save(llama, tmp_path / "graph")
    assert seen[0][0].startswith(".graph.") and seen[0][1]
