"""One thread, for the tests' models are too small for more, and transformers kept quiet."""

from __future__ import annotations

import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def one_quiet_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
