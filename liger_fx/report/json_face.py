"""A report as JSON and back; docs/report-schema.md describes the form.

GraphDiff(sites=(Site("rms_norm", ...), ...), ...)
 <->
{"format": "liger_fx.report", "schema": 2, "sites": [{"rule": "rms_norm", ...}, ...], ...}

Reading builds plain data of known types and nothing else: every field is checked, and the first
that is not as the schema says is named in one error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from liger_fx.codec import Form, Forms, decode, encode, expect, inside
from liger_fx.engine.drawing import Drawing
from liger_fx.errors import LoadError, UsageError, one_line
from liger_fx.report.amounts import totals
from liger_fx.report.block_sections import graph_count
from liger_fx.report.facts import Facts

FORMAT = "liger_fx.report"
SCHEMA = 2
READ_BY = {1: "liger_fx 0.1"}  # schemas that this version does not read, and the one that does

Found = TypeVar("Found", bound=Facts)


def to_json(diff: Facts) -> str:
    """The report as JSON text: equal reports give equal texts, byte for byte."""
    drawings = tuple(dict.fromkeys(_drawings(diff)))
    head = {"format": FORMAT, "schema": SCHEMA, "summary": summary(diff)}
    fields = encode(diff, _forms(drawings))
    whole = {**head, **fields, "drawings": encode(drawings)}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes, name: str, kind: type[Found]) -> Found:
    """The report that ``to_json`` wrote, as a ``kind``; ``name`` is what an error calls it (its
    file, say).

    Raises UsageError for text that is no report, or one of a schema that is not read.
    """
    try:
        whole = json.loads(text, parse_constant=_no_number)
        json.dumps(whole, ensure_ascii=False).encode()  # ValueError for half a character
        return from_data(whole, kind)
    except LoadError as error:
        raise UsageError(
            f"{name} is no report that this version reads: {one_line(error)}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {one_line(error)}.") from None


def from_data(whole: Any, kind: type[Found]) -> Found:
    """The report of parsed JSON; LoadError, naming the field, if it is none."""
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise LoadError(f"it has no field format: {FORMAT!r}")
    schema = whole.get("schema")
    if type(schema) is not int or schema < 1:
        raise LoadError(f"schema is {schema!r}, which is no version")
    if schema in READ_BY:
        raise LoadError(f"its schema is version {schema}, which {READ_BY[schema]} reads")
    if schema > SCHEMA:
        raise LoadError(f"its schema is version {schema}, and versions up to {SCHEMA} are known")
    with inside("drawings"):
        drawings = decode(tuple[Drawing, ...], whole.get("drawings"), {str: _TEXT})
    _check_drawings(drawings)
    fields = {
        k: v for k, v in whole.items() if k not in ("format", "schema", "summary", "drawings")
    }
    found: Found = decode(kind, fields, _forms(drawings))
    return found


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


def _forms(drawings: Sequence[Drawing]) -> Forms:
    """Sites hold the places of their drawings in a list of these."""
    places = {drawing: i for i, drawing in enumerate(drawings)}

    def drawing_at(place: Any) -> Drawing:
        if not 0 <= expect(place, int) < len(drawings):
            raise LoadError(f"is {place}, of {len(drawings)}")
        return drawings[place]

    return {Drawing: Form(places.__getitem__, drawing_at), str: _TEXT}


def _printable(text: Any) -> str:
    expect(text, str)
    if not (text.isprintable() or re.sub(r"[\n\t]", "", text).isprintable()):
        raise LoadError("has characters that are not printable")
    return str(text)


# Characters that a terminal shows, none that it would obey.
_TEXT = Form(str, _printable)


def _check_drawings(drawings: tuple[Drawing, ...]) -> None:
    """Something stood at each site, and a box reads boxes that come before it."""
    for i, drawing in enumerate(drawings):
        if not drawing.before:
            raise LoadError("is empty", f"drawings[{i}].before")
        for side, boxes in (("before", drawing.before), ("after", drawing.after)):
            for j, box in enumerate(boxes):
                wrong = [place for place in box.reads if not 0 <= place < j]
                if wrong:
                    raise LoadError(f"reads {wrong[0]}", f"drawings[{i}].{side}[{j}]")


def _no_number(text: str) -> None:
    raise LoadError(f"{text} is no number")
