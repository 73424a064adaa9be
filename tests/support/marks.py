"""Which parameters of a test run every time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(short: Collection[str], names: Iterable[str]) -> list[Any]:
    """The names as parameters; all but the short ones run with the slow tests alone."""
    return [n if n in short else pytest.param(n, marks=pytest.mark.slow) for n in names]
