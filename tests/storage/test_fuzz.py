"""A sample of the fuzzer's runs; tools/fuzz_load.py ran a hundred thousand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.storage.files import ROOT
from tools.fuzz_load import Fuzzer, make_subjects


@pytest.mark.slow
def test_two_thousand_damaged_graphs_load_or_are_refused(tmp_path: Path) -> None:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        fuzzer = Fuzzer(make_subjects(tmp_path))
        fuzzer.fuzz(2000, seed=20)
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert fuzzer.failures == []
    assert fuzzer.outcomes["refused"] > 1400 and fuzzer.outcomes["loaded"] > 50
    assert len(fuzzer.refused) > 25  # errors of many places


def test_the_recorded_result_is_of_a_hundred_thousand_runs() -> None:
    file = ROOT / "tools" / "bench" / "results" / "fuzz_load.json"
    found = json.loads(file.read_text())["results"]
    assert found["runs"] >= 100_000 and found["failures"] == []
    assert sum(found["outcomes"].values()) == found["runs"]
