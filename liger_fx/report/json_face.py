"""A report as JSON and back; docs/report-schema.md describes the form.

GraphDiff(sites=(Site("rms_norm", ...), ...), ...)
 <->
{"format": "liger_fx.report", "schema": 2, "sites": [{"rule": "rms_norm", ...}, ...], ...}

Reading builds plain data of known types and nothing else: every field is checked, and the first
that is not as the schema says is named in one error.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, TypeVar

from liger_fx.engine.drawing import Drawing
from liger_fx.errors import UsageError, one_line
from liger_fx.report.amounts import totals
from liger_fx.report.block_sections import graph_count
from liger_fx.report.facts import Facts
from liger_fx.report.plain import Malformed, decode, encode

FORMAT = "liger_fx.report"
SCHEMA = 2
READ_BY = {1: "liger_fx 0.1"}  # schemas that this version does not read, and the one that does

Found = TypeVar("Found", bound=Facts)


def to_json(diff: Facts) -> str:
    """The report as JSON text: equal reports give equal texts, byte for byte."""
    drawings = {drawing: i for i, drawing in enumerate(dict.fromkeys(_drawings(diff)))}
    head = {"format": FORMAT, "schema": SCHEMA, "summary": summary(diff)}
    fields = encode(diff, {Drawing: drawings})
    whole = {**head, **fields, "drawings": encode(tuple(drawings))}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes, name: str, kind: type[Found]) -> Found:
    """The report that ``to_json`` wrote, as a ``kind``; ``name`` is what an error calls it (its
    file, say).

    Raises UsageError for text that is no report, or one of a schema that is not read.
    """
    try:
        whole = json.loads(text, parse_constant=_no_number)
        json.dumps(whole, ensure_ascii=False).encode()  # ValueError for half a character
    except Malformed as error:
        raise UsageError(
            f"{name} is no report that this version reads: {one_line(error)}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {one_line(error)}.") from None
    return from_data(whole, name, kind)


def from_data(whole: Any, name: str, kind: type[Found]) -> Found:
    """The report of parsed JSON, with the same errors as ``from_json``."""
    try:
        return _read(whole, kind)
    except (Malformed, RecursionError) as error:
        raise UsageError(
            f"{name} is no report that this version reads: {one_line(error)}."
        ) from None


def summary(diff: Facts) -> dict[str, Any]:
    """The main numbers, for whoever reads the file with other tools; not read back."""
    done, left = (Counter(site.rule for site in s) for s in (diff.rewritten, diff.refused))
    names = dict.fromkeys([*diff.rules, *done, *left])
    before, after = totals(diff.rewritten)
    return {
        "rewritten": len(diff.rewritten),
        "refused": len(diff.refused),
        "rules": {name: {"rewritten": done[name], "refused": left[name]} for name in names},
        "operators_before": sum(diff.before.operators.values()),
        "operators_after": sum(diff.after.operators.values()),
        "graphs": graph_count(diff),
        "fallbacks": len(diff.fallbacks),
        "traffic_a_token": [before.traffic.per_token, after.traffic.per_token],
        "kept_a_token": [before.saved.per_token, after.saved.per_token],
    }


def _drawings(diff: Facts) -> list[Drawing]:
    return [site.drawing for site in diff.sites if site.drawing is not None]


def _read(whole: Any, kind: type[Found]) -> Found:
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise Malformed(f"it has no field format: {FORMAT!r}")
    schema = whole.get("schema")
    if type(schema) is not int or schema < 1:
        raise Malformed(f"schema is {schema!r}, which is no version")
    if schema in READ_BY:
        raise Malformed(f"its schema is version {schema}, which {READ_BY[schema]} reads")
    if schema > SCHEMA:
        raise Malformed(f"its schema is version {schema}, and versions up to {SCHEMA} are known")
    drawings = decode(tuple[Drawing, ...], whole.get("drawings"), "drawings")
    _check_drawings(drawings)
    fields = {
        k: v for k, v in whole.items() if k not in ("format", "schema", "summary", "drawings")
    }
    found: Found = decode(kind, fields, "", {Drawing: drawings})
    return found


def _check_drawings(drawings: tuple[Drawing, ...]) -> None:
    """Something stood at each site, and a box reads boxes that come before it."""
    for i, drawing in enumerate(drawings):
        if not drawing.before:
            raise Malformed(f"drawings[{i}].before is empty")
        for side, boxes in (("before", drawing.before), ("after", drawing.after)):
            for j, box in enumerate(boxes):
                wrong = [place for place in box.reads if not 0 <= place < j]
                if wrong:
                    raise Malformed(f"drawings[{i}].{side}[{j}] reads {wrong[0]}")


def _no_number(text: str) -> None:
    raise Malformed(f"{text} is no number")
