"""One suite, three machines: CUDA where there is a device, else PyTorch's operations on the CPU,
and Triton's interpreter when TRITON_INTERPRET=1 (test_interpreter.py runs the folder so).
"""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.accuracy import DEVICE

# PyTorch's deterministic mode, which fills memory below, asks it of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE
