"""docs/report-schema.md says what the JSON holds, and a report of each schema from 2 on is read."""

import json
import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from liger_fx.engine.drawing import Drawing
from liger_fx.errors import UsageError
from liger_fx.report import GraphDiff
from liger_fx.report.graph_diff import FACES
from liger_fx.report.json_face import FORMAT, SCHEMA, summary
from tests.report.sample import everything, sample

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "report-schema.md").read_text(encoding="utf-8")
HEAD = {"format": "text", "schema": "integer", "summary": "Summary", "drawings": "list of Drawing"}
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


def told() -> dict[str, dict[str, str]]:
    """The page's tables of fields, by heading: each field and its type."""
    found = {}
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)
        if rows:
            found[section.partition("\n")[0]] = dict(rows)
    return found


def held(kind: Any) -> Iterator[Any]:
    """A dataclass and all that its fields hold, as a report writes them."""
    yield kind
    for hint in get_type_hints(kind).values():
        for part in parts(hint):
            if is_dataclass(part):
                yield from held(part)


def parts(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in get_args(hint):
        yield from parts(inner)


def words(hint: Any) -> str:
    """A field's type as the page says it."""
    if hint is Drawing:
        return "integer"
    if is_dataclass(hint):
        return hint.__name__  # type: ignore[union-attr]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        *kinds, last = (words(a) for a in arguments if a is not type(None))
        text = " or ".join([*kinds, last])
        null = ", or null" if " or " in text else " or null"
        return text + (null if type(None) in arguments else "")
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {words(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(words, arguments))}]"
    if origin is dict:
        return f"object of {words(arguments[1])}"
    return WORDS[hint]


def test_the_page_names_every_field_with_its_type_and_no_other() -> None:
    kinds = {kind.__name__: kind for kind in held(GraphDiff)}
    expected = {
        name: {field.name: words(get_type_hints(kind)[field.name]) for field in fields(kind)}
        for name, kind in kinds.items()
    }
    pages = told()
    assert pages.pop("The schema of a report") == HEAD
    assert list(pages.pop("Summary")) == list(summary(sample()))
    assert pages == expected


def test_the_file_has_the_fields_of_the_page() -> None:
    assert set(json.loads(everything().json())) == {*HEAD, *told()["GraphDiff"]}
    assert f"`{FORMAT}`" in PAGE and f"describes schema {SCHEMA}." in PAGE


OLD = sorted(Path(__file__).parent.glob("schema_*.json"))


def test_there_is_a_report_of_each_schema() -> None:
    assert [path.stem for path in OLD] == [f"schema_{i}" for i in range(2, SCHEMA + 1)]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_a_report_of_every_schema_is_read(path: Path) -> None:
    """A Llama of one layer whose MLP was left out, against one in which it was not."""
    report = GraphDiff.from_json(path.read_bytes(), path.name)
    assert [(site.rule, site.path) for site in report.refused] == [
        ("gated_mlp", "model.layers.0.mlp")
    ]
    assert len(report.rewritten) == 4 and report.rewritten[0].drawing is not None
    (lost,) = report.lost
    assert (lost.before, lost.after) == ("LigerSwiGLUMLP", None)
    assert report.verified is not None and report.verified.ok and len(report.verified.sites) == 4
    assert report.inputs["input_ids"] == "int64[batch, sequence] on cpu"
    assert report.before.operators["mul"] > report.after.operators["mul"]
    assert [row.class_name for row in report.blocks] == [
        "LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer",
    ]  # fmt: skip
    assert "self.input_layernorm(hidden_states)" in report.blocks[-1].code
    assert [(f.path, f.reason) for f in report.fallbacks] == [
        ("", "input_ids, a Ids"),
        ("model", "input_ids, a Ids"),
        ("model.layers.0", "hidden_states, a Ids"),
    ]
    for face in FACES.values():
        assert "LigerRotaryEmbedding" in report.face(face)


def test_a_report_of_this_schema_is_written_as_it_was() -> None:
    text = OLD[-1].read_text(encoding="utf-8")
    assert GraphDiff.from_json(text).json() == text


def test_a_report_of_schema_1_is_refused_with_the_version_that_reads_it() -> None:
    first = json.dumps(json.loads(sample().json()) | {"schema": 1})
    with pytest.raises(UsageError) as error:
        GraphDiff.from_json(first, "old.json")
    assert str(error.value) == (
        "old.json is no report that this version reads: its schema is version 1, which "
        "liger_fx 0.1 reads."
    )


def test_a_later_schema_is_refused_in_a_sentence() -> None:
    later = json.dumps(json.loads(sample().json()) | {"schema": SCHEMA + 1, "new_field": []})
    with pytest.raises(UsageError) as error:
        GraphDiff.from_json(later, "new.json")
    assert str(error.value) == (
        f"new.json is no report that this version reads: its schema is version {SCHEMA + 1}, and "
        f"versions up to {SCHEMA} are known."
    )


def test_the_example_of_the_page_on_reports_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "reports.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "Verified" in (tmp_path / "report.html").read_text(encoding="utf-8")
