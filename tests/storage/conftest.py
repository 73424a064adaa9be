"""Transformers kept quiet, and one tiny optimised Llama saved for all tests to read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

import liger_fx
from liger_fx.model.block import Block
from tests.support.families import build


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def checksums_fit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who changes a file on purpose makes them fit; test_checksums.py is about other changes."""
    if request.path.name != "test_checksums.py":
        monkeypatch.setattr("liger_fx.storage.load.check_checksums", lambda *_: True)


@pytest.fixture(scope="session")
def llama() -> Block:
    """An optimised Llama of one layer, not to be changed."""
    return liger_fx.optimize(build("llama", num_hidden_layers=1), blocks=())


@pytest.fixture(scope="session")
def _saved(llama: Block, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    liger_fx.save(llama, folder)
    return folder


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved Llama, to be damaged."""
    return Path(shutil.copytree(_saved, tmp_path / "llama"))
