"""liger-fx bench: each variant in a process of its own, with the same weights and tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from liger_fx import cli
from liger_fx.tiny import tiny_model

Captured = pytest.CaptureFixture[str]
SMALL = ["--layers", "1", "--batch", "2", "--length", "16", "--steps", "3"]
ROW = r"{} +([\d.]+) ms +([\d,]+) +([\d.]+) +[\d,]+ MiB +([\d.]+)"


def test_it_times_both_on_the_same_work(capsys: Captured) -> None:
    assert cli.main(["bench", "llama", *SMALL]) == 0
    out, err = capsys.readouterr()
    original, ours = (re.search(ROW.format(name), out) for name in ("original", "liger_fx"))
    assert original and ours, out
    assert float(original[4]) == pytest.approx(float(ours[4]), abs=2e-4)  # the first loss
    times = float(original[1]) / float(ours[1])
    assert float(ours[3]) == pytest.approx(times, rel=0.1) and float(original[3]) == 1
    assert float(original[2].replace(",", "")) == pytest.approx(
        32_000 / float(original[1]), rel=0.1
    )
    assert "torch 2" in out and "==> liger_fx: 3 + 3 steps" in err


@pytest.mark.slow
def test_a_model_without_a_loss(tmp_path: Path, capsys: Captured) -> None:
    tiny_model("llama", layers=1).model.save_pretrained(tmp_path)
    assert cli.main(["bench", str(tmp_path), *SMALL]) == 2
    out, err = capsys.readouterr()
    assert err.count("A LlamaModel has no loss to train with.") == 2 and out.count("failed") == 2
    assert "Traceback" not in err


def test_a_model_that_there_is_not(capsys: Captured) -> None:
    assert cli.main(["bench", "lama", *SMALL]) == 2
    assert "'lama' is no directory" in capsys.readouterr().err
