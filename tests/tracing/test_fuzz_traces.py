"""A part of tools/fuzz_traces.py, from a fixed seed: three hundred modules, each called in six
ways."""

from typing import Any

import pytest

from tools.fuzz_traces import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_drawn_modules_are_as_their_originals_or_told(part: int) -> None:
    record: dict[str, Any] = {}
    fuzz(1000 * part, 50, record)
    assert record["failures"] == []
    assert record["runs"] == 50
    # It says something only where most of them can be called, and many get a graph.
    assert record["outcomes"].get("no example", 0) <= 15
    assert record["outcomes"].get("right", 0) >= 10
