"""Transformers kept quiet."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
