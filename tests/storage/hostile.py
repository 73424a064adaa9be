"""What every attack on a saved graph must come to: one error that names the place, no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import liger_fx
from liger_fx.errors import LoadError
from tests.storage.files import contents
from tools.fuzz_load import watched

load = liger_fx.load  # imported before the watch
assert transformers.MistralForCausalLM and transformers.LlamaForSequenceClassification


def refused(folder: Path, place: str) -> str:
    """The error's text; its place is as given, nothing was run and nothing written."""
    before = contents(folder)
    with watched() as events, pytest.raises(LoadError) as caught:
        load(folder)
    assert events == []
    assert contents(folder) == before
    text = str(caught.value)
    assert text.startswith(place), text
    assert len(text) < 500 and text.isprintable()
    return text
