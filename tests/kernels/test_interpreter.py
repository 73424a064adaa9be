"""The same tests on Triton's kernels: run in a process of their own, where Triton interprets them.

triton.jit reads TRITON_INTERPRET when a kernel is defined, so one process cannot do both.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_fx.kernels import norm, rms_norm
from liger_fx.kernels.launch import INTERPRETED, uses_triton
from tests.kernels.test_operators import DIRECT

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_this_folder_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", run.stdout)}
    # PyTorch's check of each operator is skipped, and few others.
    assert counts["passed"] > 1000 and counts["skipped"] < len(DIRECT) + 20, counts


@pytest.mark.skipif(not INTERPRETED, reason="about that process")
def test_triton_computes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    assert uses_triton(x) and not uses_triton(x.double())
    monkeypatch.setattr(norm, "launch", lambda *args, **kwargs: None)
    assert rms_norm.rms_norm(x, None, 1e-5).isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="about other processes")
def test_triton_is_for_cuda_tensors_elsewhere() -> None:
    assert not uses_triton(torch.randn(2, 8))
