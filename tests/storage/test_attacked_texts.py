"""Attacks by what a file says in words: errors and reports only show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liger_fx.errors import LoadError
from liger_fx.storage.json_file import parse
from tests.storage.files import edit, guards_in
from tests.storage.hostile import refused

CLEAR = "\x1b[2J\x1b]0;owned\x07\u202e\n" + "A" * 3000


def _versions(document: Any) -> None:
    document["fingerprint"]["code"].update(x="y")
    document["fingerprint"]["versions"].update(torch=CLEAR)


def _activation(document: Any) -> None:
    records = document["named_modules"]
    next(r for r in records if "activation" in r["options"])["options"]["activation"] = CLEAR


TEXTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "version": ("graph.json", _versions, "graph.json.fingerprint"),
    "option": ("graph.json", _activation, "graph.json.named_modules["),
    "dtype": ("config.json", lambda c: c.update(dtype=CLEAR), "config.json"),
    "activation": ("config.json", lambda c: c.update(hidden_act=CLEAR), "config.json"),
    "cache": (
        "generation_config.json",
        lambda c: c.update(cache_implementation=CLEAR),
        "generation_config.json",
    ),
    "stopping": (
        "generation_config.json",
        lambda c: c.update(early_stopping=CLEAR),
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("attack", TEXTS)
def test_errors_show_what_a_terminal_would_obey(attack: str, saved: Path) -> None:
    file, change, place = TEXTS[attack]
    edit(saved / file, change)
    refused(saved, place)  # which looks whether the text is short and printable


@pytest.mark.parametrize("text", [CLEAR, "\ud800", "\u2028" * 700, "x\n" * 5000])
def test_every_load_error_is_one_line_of_at_most_500_characters(text: str) -> None:
    error = LoadError(text, text).inside(text).inside("graph.json")
    for shown in (error.cause, error.place, str(error)):
        assert shown.isprintable() and len(shown) <= 500
    assert str(error).startswith("graph.json.")
    assert str(LoadError("a" * 200 + " do this", "here")) == f"here: {'a' * 200} do this"
    assert str(LoadError("a" * 900 + " do this", "here")).endswith("aaa do this")


@pytest.mark.parametrize("text", ["\x1b[31m", "\x07", "\u202e", "\x00", "\x9b2J"])
def test_a_report_holds_nothing_that_a_terminal_obeys(text: str, saved: Path) -> None:
    edit(saved / "report.json", lambda r: r["sites"][0].update(path=text))
    assert "sites[0].path: has characters" in refused(saved, "report.json")
    edit(
        saved / "report.json",
        lambda r: r["sites"][0].update(path="x") or r["versions"].update({text: "1"}),
    )
    assert "not printable" in refused(saved, "report.json")


@pytest.mark.parametrize("change", [
    lambda text: text.replace('"schema"', '"schema": 1, "schema"', 1).encode(),
    lambda text: text.encode("utf-16"),
    lambda text: b"\xef\xbb\xbf" + text.encode(),
])  # fmt: skip
def test_a_report_is_read_as_strictly_as_the_graph(
    change: Callable[[str], bytes], saved: Path
) -> None:
    (saved / "report.json").write_bytes(change((saved / "report.json").read_text()))
    refused(saved, "report.json")


@pytest.mark.parametrize("half", ["\ud800", "x\udfff", "\udc00\ud800"])
def test_half_a_character(half: str, saved: Path) -> None:
    def change(document: Any) -> None:
        guards_in(document)["arguments"].update(use_cache={"value": half})

    edit(saved / "graph.json", change)
    assert "surrogates" in refused(saved, "graph.json")


def test_a_whole_character_written_as_a_pair_is_one() -> None:
    assert parse(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]
