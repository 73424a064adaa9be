"""Each fact of a report stands in each of its faces: Python object, JSON, text, Markdown, page."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from liger_fx.report import GraphDiff
from tests.report.sample import BECAUSE, CODE, MASKED, everything
from tests.report.test_faces import unwrapped, visible

DIFF = everything()
READ = json.loads(DIFF.json())


def spaced(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Fact:
    """A fact: its value, where the Python object and the JSON hold it, how people are told."""

    name: str
    value: Any
    python: Callable[[GraphDiff], Any]
    json: Callable[[Any], Any]
    told: tuple[str, ...]


MISS = "wanted mean(square(x)), found sum(pow) at modeling_tiny.py:43"
FAULT = "gradient of scale: 7.50 times the original's error, at most 1.5"
OPAQUE = "layers.9.scan: Scan stays a module that is called, it branches on data"
FACTS = [
    Fact(
        "inputs", "int64[batch, sequence] on cpu",
        lambda d: d.inputs["input_ids"], lambda j: j["inputs"]["input_ids"],
        ("input_ids", "int64[batch, sequence] on cpu"),
    ),
    Fact(
        "a guard", "the model is in eval mode",
        lambda d: d.guards[1], lambda j: j["guards"][1], ("the model is in eval mode",),
    ),
    Fact("an opaque leaf", OPAQUE, lambda d: d.opaque[0], lambda j: j["opaque"][0], (OPAQUE,)),
    Fact(
        "sites of a rule", (4, 1),
        lambda d: tuple(sum(s.rule == "rms_norm" for s in x) for x in (d.rewritten, d.refused)),
        lambda j: tuple(j["summary"]["rules"]["rms_norm"][x] for x in ("rewritten", "refused")),
        ("rms_norm 5 4 1",),
    ),
    Fact(
        "a rule that found nothing", "rotary_embedding",
        lambda d: d.rules[1], lambda j: j["rules"][1], ("rotary_embedding 0 0 0",),
    ),
    Fact(
        "why a site was refused", MISS,
        lambda d: d.refused[0].reason, lambda j: j["sites"][3]["reason"], (MISS,),
    ),
    Fact(
        "the model's line", ("/models/tiny/modeling_tiny.py", 41),
        lambda d: d.refused[0].source, lambda j: tuple(j["sites"][3]["source"]),
        ("modeling_tiny.py:41",),
    ),
    Fact(
        "operators of one name", (17, 13),
        lambda d: (d.before.operators["mul"], d.after.operators["mul"]),
        lambda j: (j["before"]["operators"]["mul"], j["after"]["operators"]["mul"]),
        ("mul 17 13 -4",),
    ),
    Fact(
        "all operators", (29, 25),
        lambda d: tuple(sum(side.operators.values()) for side in (d.before, d.after)),
        lambda j: (j["summary"]["operators_before"], j["summary"]["operators_after"]),
        ("29", "25"),
    ),
    Fact(
        "a line of the module trees", ("TinyNorm", "FusedNorm(eps=1e-06)"),
        lambda d: (str(d.before.tree[3]), str(d.after.tree[3])),
        lambda j: (
            j["before"]["tree"][3]["class_name"],
            "{class_name}({detail})".format(**j["after"]["tree"][3]),
        ),
        ("TinyNorm", "FusedNorm(eps=1e-06)"),
    ),
    Fact(
        "a node before", ("mean", "-1, keepdim=True", "float32", ("batch", "sequence", 1), (1,)),
        lambda d: box(d.sites[0].drawing.before[2]),
        lambda j: box_of(j["drawings"][j["sites"][0]["drawing"]]["before"][2]),
        ("mean", "-1, keepdim=True", "float32[batch, sequence, 1]"),
    ),
    Fact(
        "the node after",
        ("FusedNorm", "(8,), eps=1e-06", "bfloat16", ("batch", "sequence", 8), (0,)),
        lambda d: box(d.sites[0].drawing.after[1]),
        lambda j: box_of(j["drawings"][j["sites"][0]["drawing"]]["after"][1]),
        ("FusedNorm", "(8,), eps=1e-06", "bfloat16[batch, sequence, 8]"),
    ),
    Fact(
        "memory traffic of a site", (20480, 4321),
        lambda d: costs(d, "traffic"), lambda j: costs_of(j, "traffic"), ("20.0 KiB -> 4,321 B",),
    ),
    Fact(
        "memory traffic of a call", (48, 16),
        lambda d: costs(d, "traffic", "fixed"), lambda j: costs_of(j, "traffic", "fixed"),
        ("48 B -> 16 B a call",),
    ),
    Fact(
        "activations of a site", (3333, 1234),
        lambda d: costs(d, "saved"), lambda j: costs_of(j, "saved"), ("3,333 B -> 1,234 B",),
    ),
    Fact(
        "memory traffic of all sites", [81920, 17284],
        lambda d: [sum(c) for c in zip(*[costs(d, "traffic")] * 4, strict=True)],
        lambda j: j["summary"]["traffic_a_token"], ("80.0 KiB -> 16.9 KiB", "-79 %"),
    ),
    Fact(
        "the verdict", (False, "bfloat16", "cpu", "input_ids 2 x 7"),
        lambda d: (d.verified.ok, d.verified.dtype, d.verified.device, d.verified.inputs),
        lambda j: tuple(j["verified"][x] for x in ("ok", "dtype", "device", "inputs")),
        ("NOT as promised, in bfloat16 on cpu", "inputs: input_ids 2 x 7"),
    ),
    Fact(
        "errors of the outputs", (2.5e-07, 0.97, 1.1),
        lambda d: (lambda m: (m.original, m.ratio, m.bound))(d.verified.together[0]),
        lambda j: tuple(j["verified"]["together"][0][x] for x in ("original", "ratio", "bound")),
        ("outputs 2.50e-07 2.43e-07 0.97 1.1 ok",),
    ),
    Fact(
        "the worst gradient", ("layers.2.norm.scale", 1.23),
        lambda d: (d.verified.worst.name, d.verified.worst.ratio),
        lambda j: (j["verified"]["worst"]["name"], j["verified"]["worst"]["ratio"]),
        ("layers.2.norm.scale 2.50e-07 3.07e-07 1.23 1.5 ok",),
    ),
    Fact(
        "a fault", f"layers.4.norm: {FAULT}",
        lambda d: d.verified.faults[0], lambda j: j["verified"]["faults"][0],
        (f"layers.4.norm: {FAULT}",),
    ),
    Fact(
        "what verify did not look at", "the graph for position_ids was not run",
        lambda d: d.verified.remarks[0], lambda j: j["verified"]["remarks"][0],
        ("the graph for position_ids was not run",),
    ),
    Fact(
        "a site that was verified", ("layers.0.norm", None, 0.91),
        lambda d: (lambda s: (s.path, s.fault, s.outputs.ratio))(d.verified.sites[0]),
        lambda j: (lambda s: (s["path"], s["fault"], s["outputs"]["ratio"]))(
            j["verified"]["sites"][0]
        ),
        ("layers.0.norm 1 0.91 x - ok",),
    ),
    Fact(
        "a lost site", ("layers.3.norm", "FusedNorm", None, MISS),
        lambda d: (lambda c: (c.path, c.before, c.after, c.reason))(d.lost[0]),
        lambda j: tuple(j["changes"][0][x] for x in ("path", "before", "after", "reason")),
        ("No longer rewritten", "rms_norm layers.3.norm 1 FusedNorm - wanted mean(square(x))"),
    ),
    Fact(
        "a site that is not there any more", ("layers.2.mlp", "FusedMLP", None),
        lambda d: (lambda c: (c.path, c.before, c.reason))(d.lost[1]),
        lambda j: tuple(j["changes"][1][x] for x in ("path", "before", "reason")),
        ("gated_mlp layers.2.mlp 1 FusedMLP - nothing like it is there any more",),
    ),
    Fact(
        "a site that is new", ("layers.4.norm", None, "FusedNorm", False),
        lambda d: (lambda c: (c.path, c.before, c.after, c.lost))(d.changes[2]),
        lambda j: tuple(j["changes"][2][x] for x in ("path", "before", "after", "lost")),
        ("Newly or otherwise rewritten", "rms_norm layers.4.norm 1 - FusedNorm"),
    ),
    Fact(
        "how many changed", (2, 1),
        lambda d: (len(d.lost), len(d.changes) - len(d.lost)),
        lambda j: tuple(sum(c["lost"] is lost for c in j["changes"]) for lost in (True, False)),
        ("what both have alike is left out", "No longer rewritten"),
    ),
    Fact(
        "alike blocks", ("TinyLayer", 5),
        lambda d: (d.blocks[1].class_name, len(d.blocks[1].paths)),
        lambda j: (j["blocks"][1]["class_name"], len(j["blocks"][1]["paths"])),
        ("TinyLayer", "layers.0-4"),
    ),
    Fact(
        "a kind of call", MASKED,
        lambda d: d.blocks[1].calls[1], lambda j: j["blocks"][1]["calls"][1],
        (MASKED,),
    ),
    Fact(
        "the code of a graph", CODE,
        lambda d: d.blocks[1].code, lambda j: j["blocks"][1]["code"],
        (spaced(CODE),),
    ),
    Fact(
        "how many graphs, and how many calls ran none", (3, 2),
        lambda d: (sum(len(b.calls) for b in d.blocks), len(d.fallbacks)),
        lambda j: (j["summary"]["graphs"], len(j["fallbacks"])),
        ("3 distinct graphs for 6 blocks; 2 calls fell back to the model's own code",),
    ),
    Fact(
        "a call that no graph served", ("layers.1", "TinyLayer", "hidden_states, packed", BECAUSE),
        lambda d: (lambda f: (f.path, f.class_name, f.call, f.reason))(d.fallbacks[0]),
        lambda j: tuple(j["fallbacks"][0][x] for x in ("path", "class_name", "call", "reason")),
        ("Calls that no graph served", "TinyLayer hidden_states, packed scan branches on data"),
    ),
    Fact(
        "versions", "2.13.0", lambda d: d.versions["torch"], lambda j: j["versions"]["torch"],
        ("liger_fx 0.1.0, torch 2.13.0",),
    ),
    Fact(
        "versions before", "2.11.0",
        lambda d: d.versions_before["torch"], lambda j: j["versions_before"]["torch"],
        ("before: liger_fx 0.0.9, torch 2.11.0",),
    ),
]  # fmt: skip


def box(found: Any) -> tuple[Any, ...]:
    return found.label, found.detail, found.dtype, found.shape, found.reads


def box_of(found: Any) -> tuple[Any, ...]:
    shape, reads = tuple(found["shape"]), tuple(found["reads"])
    return found["label"], found["detail"], found["dtype"], shape, reads


def costs(diff: GraphDiff, what: str, count: str = "per_token") -> tuple[int, ...]:
    drawing = diff.sites[0].drawing
    assert drawing is not None
    return tuple(
        getattr(getattr(cost, what), count) for cost in (drawing.cost_before, drawing.cost_after)
    )


def costs_of(read: Any, what: str, count: str = "per_token") -> tuple[int, ...]:
    drawing = read["drawings"][read["sites"][0]["drawing"]]
    return tuple(drawing[cost][what][count] for cost in ("cost_before", "cost_after"))


def page_text(page: str) -> str:
    """What a reader of the page comes upon: its text, its labels, and what the tree shows."""
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    read = re.sub(r'<[^>]*aria-label="([^"]*)"[^>]*>', r" \1 ", shown)
    text = html.unescape(re.sub(r"</?\w[^>]*>", " ", read)).replace("→", "->").replace("−", "-")
    return spaced(text)


SHOWN = {
    "text": spaced(unwrapped(DIFF.text(full=True))),
    "markdown": spaced(visible(DIFF.markdown(full=True)).replace("|", " ")),
    "html": page_text(DIFF.html()),
}
ids = [fact.name for fact in FACTS]


@pytest.mark.parametrize("fact", FACTS, ids=ids)
def test_the_object_and_the_json_hold_it(fact: Fact) -> None:
    assert fact.python(DIFF) == fact.value
    assert fact.json(READ) == fact.value
    assert fact.python(GraphDiff.from_json(DIFF.json())) == fact.value


@pytest.mark.parametrize("face", SHOWN)
@pytest.mark.parametrize("fact", FACTS, ids=ids)
def test_the_faces_for_people_tell_it(fact: Fact, face: str) -> None:
    assert [told for told in fact.told if told not in SHOWN[face]] == []
