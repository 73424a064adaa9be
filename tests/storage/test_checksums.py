"""What is not as it was written is not loaded, unless that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import liger_fx
from liger_fx.errors import LoadError
from liger_fx.model.block import Block
from liger_fx.storage.checksums import check_checksums
from tests.storage.files import contents
from tests.support.families import build

FILES = (
    "buffers.safetensors", "checksums.json", "config.json", "generation_config.json",
    "graph.json", "model.safetensors", "report.json",
)  # fmt: skip


def flip(file: Path, place: float) -> None:
    """Another bit at that part of the file."""
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)


def test_every_file_has_one(saved: Path) -> None:
    assert sorted(contents(saved)) == sorted(FILES)
    liger_fx.load(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_bit(name: str, place: float, saved: Path) -> None:
    flip(saved / name, place)
    with pytest.raises(LoadError) as error:
        liger_fx.load(saved)
    # Of one in the checksums themselves, the file that it was the checksum of.
    assert name in str(error.value) or name == "checksums.json"


def remove(file: Path) -> None:
    file.unlink()


def add(file: Path) -> None:
    shutil.copy(file.parent / "config.json", file)


@pytest.mark.parametrize(
    "change, name, words",
    [
        (remove, "generation_config.json", "is missing"),
        (remove, "report.json", "is missing"),
        (remove, "model.safetensors", "is missing"),
        (remove, "checksums.json", "is missing"),
        (add, "model.safetensors.index.json", "was not there"),
    ],
)
def test_files_gone_or_new(
    change: Callable[[Path], None], name: str, words: str, saved: Path
) -> None:
    change(saved / name)
    with pytest.raises(LoadError, match=words) as error:
        liger_fx.load(saved)
    assert name in str(error.value) and "verify_checksums=False" in str(error.value)


def test_not_asked_for(saved: Path) -> None:
    (saved / "generation_config.json").unlink()
    (saved / "checksums.json").write_text("{")
    liger_fx.load(saved, verify_checksums=False)


def test_files_of_others_beside_it(saved: Path) -> None:
    """A tokenizer, a card."""
    (saved / "tokenizer.json").write_text("{}")
    liger_fx.load(saved)


def test_weights_that_are_not_read(saved: Path, tmp_path: Path) -> None:
    """Those of the model or checkpoint that is given are."""
    whole = shutil.copytree(saved, tmp_path / "whole")
    flip(saved / "model.safetensors", 0.98)
    liger_fx.load(saved, model=build("llama", num_hidden_layers=1))
    liger_fx.load(saved, checkpoint=whole)
    with pytest.raises(LoadError, match="model.safetensors"):
        liger_fx.load(saved)


def test_without_weights(llama: Block, tmp_path: Path) -> None:
    liger_fx.save(llama, tmp_path / "bare", weights=False)
    liger_fx.load(tmp_path / "bare", model=build("llama", num_hidden_layers=1))


@pytest.mark.parametrize("text", ["[]", '{"../config.json": ""}', '{"config.json": 1}', "{", ""])
def test_damaged_checksums(text: str, saved: Path) -> None:
    (saved / "checksums.json").write_text(text)
    with pytest.raises(LoadError):
        liger_fx.load(saved)


def test_those_of_the_directory_that_every_version_reads() -> None:
    assert check_checksums(Path(__file__).parent / "schema_2", weights=True)
