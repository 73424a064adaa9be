"""Attacks on blocks, on what they are called with, and on the check that this becomes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.storage.expressions import check
from liger_fx.tracing.call import CallSpec, InputSpec
from liger_fx.tracing.guards import Guards, compile_take
from tests.storage.files import edit
from tests.storage.hostile import refused
from tests.support.families import build, make_inputs

CODE = "__import__('os').system('x')"
ROOT, MODEL, LAYERS = range(3)


@pytest.fixture(scope="module")
def _generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opt = liger_fx.optimize(build("llama"))
    opt.generate(make_inputs(opt, 1, 4)["input_ids"], max_new_tokens=3, do_sample=False)
    folder = tmp_path_factory.mktemp("blocks") / "llama"
    liger_fx.save(opt, folder)
    return folder


@pytest.fixture
def blocks(_generated: Path, tmp_path: Path) -> Path:
    """A copy of a Llama of two alike layers, with plans for calls with a cache."""
    return Path(shutil.copytree(_generated, tmp_path / "llama"))


def plan(document: Any, block: int = LAYERS) -> Any:
    return document["blocks"][block]["plans"][0]


def cached(document: Any) -> Any:
    """The guards of a plan that takes a cache."""
    plans = (p for block in document["blocks"] for p in block["plans"])
    return next(p["guards"] for p in plans if "object" in str(p["guards"]["arguments"]))


def argument(value: Any) -> Callable[[Any], Any]:
    return lambda d: plan(d)["guards"]["arguments"].update(hidden_states=value)


def call_of(document: Any, block: int = MODEL) -> Any:
    return next(n for n in plan(document, block)["nodes"] if "plan" in n)


def nested(depth: int) -> Any:
    value: Any = {"value": 1}
    for _ in range(depth):
        value = {"items": ["tuple", None, [value]]}
    return value


def read(*steps: Any, argument: str = "past_key_values") -> Callable[[Any], Any]:
    record = {"argument": argument, "steps": list(steps), "value": 1}
    return lambda d: cached(d).update(reads=[record])


def sized(name: str, guard: str) -> Callable[[Any], Any]:
    """A size of this name, and a guard."""

    def change(document: Any) -> None:
        guards = plan(document)["guards"]
        spec = {"number": ["int", name]}
        guards["arguments"]["zz"] = spec
        guards["sizes"].append(guard)

    return change


def path_in(block: int, path: str) -> Callable[[Any], Any]:
    return lambda d: d["blocks"][block]["paths"].append(path)


ATTACKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no kind": (argument({"code": CODE}), "blocks[2].plans[0].guards.arguments.hidden_states"),
    "two kinds": (argument({"value": 1, "object": "DynamicCache"}), "blocks[2]"),
    "no object": (argument(CODE), "blocks[2].plans[0].guards.arguments.hidden_states"),
    "number's kind": (argument({"number": ["exec", None]}), "blocks[2]"),
    "float as size": (argument({"number": ["float", "a"]}), "blocks[2]"),
    "number's size": (argument({"number": ["int", CODE]}), "blocks[2]"),
    "reserved size": (argument({"number": ["int", "min"]}), "blocks[2]"),
    "module of Python as size": (argument({"number": ["int", "math"]}), "blocks[2]"),
    "cache from elsewhere": (argument({"object": "torch"}), "blocks[2]"),
    "class that is no cache": (argument({"object": "PreTrainedConfig"}), "blocks[2]"),
    "container": (argument({"items": ["set", None, []]}), "blocks[2]"),
    "output of Python": (argument({"items": ["os:system", [], []]}), "blocks[2]"),
    "model as output": (
        argument({"items": ["transformers.modeling_utils:PreTrainedModel", [], []]}),
        "blocks[2]",
    ),
    "tuple with keys": (argument({"items": ["tuple", ["a"], [{"value": 1}]]}), "blocks[2]"),
    "dictionary without keys": (argument({"items": ["dict", None, []]}), "blocks[2]"),
    "keys too few": (argument({"items": ["dict", ["a"], []]}), "blocks[2]"),
    "a key twice": (argument({"items": ["dict", ["a", "a"], [{"value": 1}] * 2]}), "blocks[2]"),
    "key": (argument({"items": ["dict", [[1]], [{"value": 1}]]}), "blocks[2]"),
    "true as key": (argument({"items": ["dict", [True], [{"value": 1}]]}), "blocks[2]"),
    "deep": (argument(nested(12)), "blocks[2]"),
    "wide": (argument({"items": ["tuple", None, [{"value": 1}] * 600]}), "blocks[2]"),
    "many": (argument({"items": ["list", None, [
        {"items": ["list", None, [{"value": 1}] * 500]}] * 9]}), "blocks[2]"),
    "plain value": (argument({"value": {"node": "x"}}), "blocks[2]"),
    "hint of nothing": (lambda d: plan(d)["guards"]["hints"].update(zz=3), "blocks[2]"),
    "loose": (lambda d: plan(d)["guards"]["loose"].append(CODE), "blocks[2].plans[0].guards.loose"),
    "attribute's name": (lambda d: plan(d)["guards"].update(attributes={CODE: "x"}), "blocks[2]"),
    "reserved name": (
        lambda d: plan(d)["guards"].update(attributes={"math": "self_attn.layer_idx"}),
        "blocks[2].plans[0].guards",
    ),
    "attribute's path": (lambda d: plan(d)["guards"].update(attributes={"a": CODE}), "blocks[2]"),
    "dunder path": (
        lambda d: plan(d)["guards"].update(attributes={"a": "self_attn.__class__"}), "blocks[2]",
    ),
    "module as number": (
        lambda d: plan(d)["guards"].update(attributes={"a": "self_attn"}),
        "blocks[2].plans[0].guards: model.layers.0 has no number self_attn",
    ),
    "flag as number": (
        lambda d: plan(d)["guards"].update(attributes={"a": "self_attn.training"}), "blocks[2]",
    ),
    "hexadecimal": (lambda d: plan(d)["guards"].update(attributes={"a": "0x1"}), "blocks[2]"),
    "attribute is a size": (
        lambda d: plan(d)["guards"].update(attributes={"batch": "self_attn.layer_idx"}),
        "blocks[2]",
    ),
    "block's attribute": (lambda d: d["blocks"][2].update(attributes=["mlp.x"]), "blocks[2]"),
    "read of a tensor": (read(["attr", "layers"], argument="hidden_states"), "blocks["),
    "read of nothing": (read(["attr", "layers"], argument=CODE), "blocks["),
    "no steps": (read(), "blocks["),
    "many steps": (read(*[["item", 0]] * 9), "blocks["),
    "step": (read(["exec", CODE]), "blocks["),
    "empty step": (read([]), "blocks["),
    "attribute read": (read(["attr", "__class__"]), "blocks["),
    "code read": (read(["attr", f"layers, {CODE}"]), "blocks["),
    "method": (read(["call", "crop", 0]), "blocks["),
    "changing method": (read(["call", "reset"]), "blocks["),
    "method as list": (read(["call", ["get"]]), "blocks["),
    "attribute with arguments": (read(["attr", "layers", 1]), "blocks["),
    "method's arguments": (read(["call", "get_seq_length", 1, 2, 3, 4, 5]), "blocks["),
    "argument of a method": (read(["call", "get_seq_length", [1]]), "blocks["),
    "own number": (read(["item", {"own": CODE}]), "blocks["),
    "own number of no path": (read(["item", {"own": 1}]), "blocks["),
    "own nothing": (read(["item", {"own": "gone.x"}]), "blocks["),
    "own and more": (read(["item", {"own": "a", "b": 1}]), "blocks["),
    "read value": (
        lambda d: cached(d).update(
            reads=[{"argument": "past_key_values", "steps": [["item", 0]], "value": [1]}]
        ),
        "blocks[",
    ),
    "plan out of range": (lambda d: call_of(d).update(plan=99), "blocks[1].plans[0].nodes ("),
    "plan below zero": (lambda d: call_of(d).update(plan=-1), "blocks[1].plans[0].nodes ("),
    "plan as text": (lambda d: call_of(d).update(plan=CODE), "blocks[1].plans[0].nodes["),
    "plan missing": (lambda d: call_of(d).pop("plan"), "blocks[1].plans[0].nodes ("),
    "plan of no block": (
        lambda d: call_of(d).update(target="embed_tokens"), "blocks[1].plans[0].nodes (",
    ),
    "plan of a function": (
        lambda d: next(
            n for n in plan(d)["nodes"] if n["op"] == "call_function"
        ).update(plan=0),
        "blocks[2].plans[0].nodes (",
    ),
    "path that is not there": (path_in(LAYERS, "model.gone"), "blocks[2].paths"),
    "path of Python": (path_in(LAYERS, "model.__class__"), "blocks[2].paths"),
    "path twice": (path_in(LAYERS, "model.layers.0"), "blocks[2]"),
    "path of another block": (path_in(LAYERS, "model"), "blocks[2]"),
    "unlike block": (path_in(LAYERS, "model.layers"), "blocks[2]"),
    "named module": (path_in(LAYERS, "model.norm"), "blocks[1].plans[0].nodes ("),
    "inside a named module": (
        lambda d: d["blocks"].append({"paths": ["model.layers.0.mlp.act_fn"], "plans": []}),
        "blocks[3].paths",
    ),
    "no paths": (lambda d: d["blocks"][2].update(paths=[]), "blocks[2].paths"),
    "no root": (lambda d: d["blocks"].pop(0), "blocks"),
    "no blocks": (lambda d: d.update(blocks=[]), "blocks"),
    "many plans": (
        lambda d: d["blocks"][2].update(plans=[plan(d)] * 17), "blocks[2].plans: are 17",
    ),
    "unknown field": (lambda d: d["blocks"][2].update(code=CODE), "blocks[2]"),
    "brackets": (
        lambda d: plan(d)["guards"]["sizes"].append("(" * 197 + "1" + ")" * 197), "blocks[2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_blocks(attack: str, blocks: Path) -> None:
    change, place = ATTACKS[attack]

    def apply(document: Any) -> None:
        change(document)

    edit(blocks / "graph.json", apply)
    refused(blocks, f"graph.json.{place}")


@pytest.mark.parametrize(
    "name, guard",
    [
        ("e5", "1e5 > 1"), ("x1F", "0x1F > 1"), ("_000", "1_000 > 1"), ("E2", "1.E2 > 1"),
        ("v0", "v0 > 0"), ("c0", "c0 > 0"), ("block2", "block2 > 0"), ("sv0", "sv0 > 0"),
    ],
)  # fmt: skip
def test_names_that_look_like_other_text_of_the_check(name: str, guard: str) -> None:
    call = CallSpec({"x": InputSpec((name, 3), torch.float32, torch.device("cpu"))})
    take = compile_take(Guards(call, (check(guard, {name}),), False, None, {}, False))
    assert take(nn.Module(), {"x": torch.zeros(2, 3)}) is not None
    assert take(nn.Module(), {"x": torch.zeros(2, 4)}) is None


def test_a_block_that_is_asked_for_what_divides_by_zero(blocks: Path) -> None:
    def change(document: Any) -> None:
        guards = plan(document)["guards"]
        guards["attributes"] = {"index": "self_attn.layer_idx"}
        guards["sizes"].append("1 // index > 0")

    edit(blocks / "graph.json", change)
    before = copy.deepcopy(liger_fx.load(blocks).model.layers[0])
    assert len(before.plans) < len(before._block.alike.plans)
