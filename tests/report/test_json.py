"""The JSON face: what is written is read back, and nothing else is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import liger_fx
from liger_fx.errors import UsageError
from liger_fx.report import GraphDiff
from liger_fx.report.graph_diff import FACES
from liger_fx.report.json_face import SCHEMA
from liger_fx.tiny import tiny_model
from tests.report.sample import DRAWING, sample

WRITTEN: dict[str, Any] = json.loads(sample().json())


def test_what_is_written_is_read_back() -> None:
    text = sample().json()
    again = GraphDiff.from_json(text)
    assert again == sample() and again.json() == text
    assert again.sites[0].drawing == DRAWING and again.verified == sample().verified


def test_a_real_report_is_read_back() -> None:
    report = liger_fx.optimize(tiny_model("phi3", 2)).report
    assert report is not None
    again = GraphDiff.from_json(report.json().encode())
    assert again == report and again.text() == report.text()


def test_alike_sites_share_a_drawing() -> None:
    assert len(WRITTEN["drawings"]) == 2
    assert [site["drawing"] for site in WRITTEN["sites"]] == [0, 0, 0, 1, 0]
    again = GraphDiff.from_json(json.dumps(WRITTEN))
    assert again.sites[0].drawing is again.sites[1].drawing


def test_the_summary_counts() -> None:
    assert WRITTEN["summary"] == {
        "rewritten": 4,
        "refused": 1,
        "rules": {
            "rms_norm": {"rewritten": 4, "refused": 1},
            "rotary_embedding": {"rewritten": 0, "refused": 0},
        },
        "operators_before": 29,
        "operators_after": 25,
        "graphs": 3,
        "fallbacks": 2,
        "traffic_a_token": [81920, 17284],
        "kept_a_token": [13332, 4936],
    }


def changed(path: str, value: Any) -> str:
    """The written report with one field changed, or left out if the value is Ellipsis."""
    whole = json.loads(json.dumps(WRITTEN))
    *parents, last = path.split("/")
    place = whole
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(whole)


BAD = [
    ("format", "something.else", "format"),
    ("schema", SCHEMA + 1, f"version {SCHEMA + 1}, and versions up to {SCHEMA}"),
    ("schema", 1, "schema is version 1, which liger_fx 0.1 reads"),
    ("schema", True, "schema is True"),
    ("schema", ..., "schema is None"),
    ("sites", ..., "sites: is missing"),
    ("sites/1/rule", 5, r"sites\[1\].rule: is an integer, not a string"),
    ("sites/1/rule", ..., r"sites\[1\].rule: is missing"),
    ("sites/1/surprise", 1, r"sites\[1\]: has the unknown field 'surprise'"),
    ("sites/0/drawing", 2, r"sites\[0\].drawing: is 2, of 2"),
    ("sites/0/drawing", -1, r"sites\[0\].drawing: is -1"),
    ("sites/0/source", ["file.py"], r"sites\[0\].source: has 1 items, not 2"),
    ("sites/0/source", ["file.py", "41"], r"sites\[0\].source\[1\]: is a string, not an integer"),
    ("before/operators/mul", "many", "before.operators.mul: is a string"),
    ("after/tree", {}, "after.tree: is an object, not a list"),
    ("drawings/0/before/1/shape", [[8]], r"drawings\[0\].before\[1\].shape\[0\]: is a list"),
    ("drawings/0/before/1/reads", [7], r"drawings\[0\].before\[1\]: reads 7"),
    ("drawings/0/before/1/reads", [1], r"drawings\[0\].before\[1\]: reads 1"),
    ("drawings/1/before", [], r"drawings\[1\].before: is empty"),
    ("verified/ok", 1, "verified.ok: is an integer, not true or false"),
    ("blocks/1/code", None, r"blocks\[1\].code: is null, not a string"),
    ("blocks/1/paths", "layers.0", r"blocks\[1\].paths: is a string, not a list"),
    ("fallbacks/0/reason", ..., r"fallbacks\[0\].reason: is missing"),
    ("rules", "rms_norm", "rules: is a string, not a list"),
    ("__class__", "os.system", "has the unknown field '__class__'"),
    ("inputs/a\n\x1b[31m", 7, r"inputs.'a\\n\\x1b\[31m': is an integer, not a string"),
    ("before/\n", None, r"before: has the unknown field '\\n'"),
]


@pytest.mark.parametrize("path, value, said", BAD)
def test_what_does_not_fit_is_named_in_one_error(path: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        GraphDiff.from_json(changed(path, value), "old/report.json")
    assert str(error.value).startswith("old/report.json is no report") and "\n" not in str(
        error.value
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "[" * 100_000,
        '{"format": NaN}',
        "[]",
        "null",
        b"\xff\xfe",
        "1e999",
        '["\\ud800"]',
    ],
)
def test_what_is_no_json_is_one_error(text: str | bytes) -> None:
    with pytest.raises(UsageError, match="^the report is no "):
        GraphDiff.from_json(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """The written report with one value anywhere in it replaced or one field taken away."""
    whole = json.loads(json.dumps(WRITTEN))
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        below = place[key]
        if not isinstance(below, dict | list) or not below or draw(st.integers(0, 5)) == 0:
            break
        place = below
    if draw(st.booleans()):
        del place[key]
    else:
        place[key] = draw(values)
    return json.dumps(whole)


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_a_mutated_report_is_read_or_is_one_error(text: str) -> None:
    try:
        read = GraphDiff.from_json(text)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        for shown in map(read.face, FACES.values()):
            assert isinstance(shown, str)
