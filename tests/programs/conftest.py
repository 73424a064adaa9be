"""Quiet, offline, one thread: the programs' models are too small for more."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def one_quiet_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
