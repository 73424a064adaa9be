"""Quiet, offline, one thread: the programs' models are too small for more.

Of the subjects in HELD the first case of each test is run with the fast tests. Everything else is
marked slow: it takes minutes, and not all of it holds yet (`make test-all` tells what does not).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from pathlib import Path

import pytest
import torch
import transformers

HERE = Path(__file__).parent
HELD = (
    "test_calls.py", "test_checkpointing.py", "test_copies.py", "test_hooks.py", "test_offload.py",
    "test_peft.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow all but the first case of each test of what is held."""
    seen: set[tuple[Path, str]] = set()
    for item in items:
        if HERE not in item.path.parents:
            continue
        test = (item.path, getattr(item, "originalname", item.name))
        if test in seen or item.path.name not in HELD:
            item.add_marker(pytest.mark.slow)
        seen.add(test)


@pytest.fixture(scope="session", autouse=True)
def one_quiet_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
