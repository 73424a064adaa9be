"""Attacks through what a graph calls, and through the text that becomes Python code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.storage.files import edit, guards_in, node
from tests.storage.hostile import load, refused
from tools.fuzz_load import watched

SYSTEM = "__import__('os').system('touch /tmp/liger_fx_attack')"

# What is called: name of a node, its fields after the attack, and the place that is named.
CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "os": ("arange", {"target": "os.system"}, "target"),
    "posix": ("arange", {"target": "posix.system"}, "target"),
    "subprocess": ("arange", {"target": "subprocess.Popen"}, "target"),
    "builtins": ("arange", {"target": "builtins.exec"}, "target"),
    "eval": ("arange", {"target": "eval"}, "target"),
    "importlib": ("arange", {"target": "importlib.import_module"}, "target"),
    "torch.load": ("arange", {"target": "torch.load"}, "target"),
    "torch.hub": ("arange", {"target": "torch.hub.load"}, "target"),
    "load_library": ("arange", {"target": "torch.ops.load_library"}, "target"),
    "private": ("arange", {"target": "torch._C._set_grad_enabled"}, "target"),
    "attrgetter": ("arange", {"target": "operator.attrgetter"}, "target"),
    "methodcaller": ("arange", {"target": "operator.methodcaller"}, "target"),
    "resolve": ("arange", {"target": "liger_fx.resolve"}, "target"),
    "dunder method": ("view", {"target": "__reduce__"}, "target"),
    "class": ("view", {"target": "__class__"}, "target"),
    "hook": ("view", {"target": "register_hook"}, "target"),
    "callback": ("view", {"target": "apply_"}, "target"),
    "memory": ("view", {"target": "set_"}, "target"),
    "saving": ("view", {"target": "save_pretrained"}, "target"),
    "dotted method": ("view", {"target": "view.__globals__"}, "target"),
    "module path": ("model_norm", {"target": "model.norm.__class__"}, "target"),
    "traversal": ("model_norm", {"target": "../../os"}, "target"),
    "injected path": ("model_norm", {"target": 'model"), os.system("x'}, "target"),
    "no module": ("model_norm", {"target": "model.gone"}, ""),
    "attribute": ("model", {"target": "model.config"}, ""),
    "operation": ("arange", {"op": "exec"}, "op"),
    "name": ("arange", {"name": "x; import os"}, "name"),
    "call as name": ("arange", {"name": SYSTEM}, "name"),
    "keyword": ("arange", {"name": "class"}, "name"),
    "self": ("arange", {"name": "self"}, "name"),
    "builtin": ("arange", {"name": "print"}, "name"),
    "letters": ("arange", {"name": "\u0430range"}, "name"),
    "two of a name": ("arange", {"name": "input_ids"}, "name"),
    "default": ("input_ids", {"target": f"input_ids={SYSTEM}"}, "target"),
    "default value": ("input_ids", {"args": [1]}, "args"),
    "keyword argument": ("arange", {"kwargs": {f"a={SYSTEM}, b": 1}}, "kwargs."),
    "reserved argument": ("arange", {"kwargs": {"lambda": 1}}, "kwargs."),
    "unknown value": ("arange", {"args": [{"pickle": "gASVAAAA"}]}, "args[0]"),
    "code": ("arange", {"args": [{"code": SYSTEM}]}, "args[0]"),
    "no dtype": ("arange", {"args": [{"dtype": "__class__"}]}, "args[0].dtype"),
    "no device": ("arange", {"args": [{"device": "cpu;os"}]}, "args[0].device"),
    "huge number": ("arange", {"args": [10**30]}, "args[0]"),
    "itself": ("arange", {"args": [{"node": "arange"}]}, "args[0]"),
    "cycle": ("arange", {"args": [{"node": "unsqueeze"}]}, "args[0]"),
    "nowhere": ("arange", {"args": [{"tuple": [{"node": "nowhere"}]}]}, "args[0].tuple[0]"),
    "nested deeply": ("arange", {"args": [json.loads("[" * 90 + "]" * 90)]}, "args[0]"),
    "operator's arguments": ("getitem", {"args": []}, "args"),
    "method of nothing": ("view", {"args": [1]}, "args"),
    "huge shape": ("arange", {"spec": ["int64", 2**63]}, "spec"),
    "shape with code": ("arange", {"spec": ["int64", SYSTEM]}, "spec"),
    "wrong dtype": ("arange", {"spec": ["object"]}, "spec"),
    "unknown field": ("arange", {"eval": SYSTEM}, ""),
    "type of a field": ("arange", {"args": {"0": 1}}, "args"),
    "output class": ("model_output", {"args": ["os:system"]}, ""),
    "output from elsewhere": ("model_output", {"args": ["subprocess:Popen"]}, ""),
    "output that is none": (
        "model_output",
        {"args": ["transformers.modeling_outputs:OrderedDict"]},
        "",
    ),
    "class as output": (
        "model_output",
        {"args": ["transformers.models.llama.modeling_llama:LlamaModel"]},
        "",
    ),
    "nested output": ("model_output", {"args": ["transformers.modeling_outputs:a.b"]}, ""),
    "computed output": ("model_output", {"args": [{"node": "input_ids"}]}, ""),
    "config's own": ("new_cache", {"kwargs": {"__class__": 1}}, ""),
    "mask builder": ("build_mask", {"args": ["os", {"node": "model"}]}, ""),
    "mask helper": ("build_mask", {"args": ["create_masks_for_generate", {"node": "model"}]}, ""),
    "cache method": ("cache_call", {"args": [{"node": "new_cache"}, "__reduce__"]}, ""),
    "cache's crop": ("cache_call", {"args": [{"node": "new_cache"}, "crop", 0]}, ""),
    "no cache": ("cache_call", {"args": [{"node": "model"}, "update"]}, ""),
    "getattr": ("arange", {"target": "getattr", "args": [{"node": "model"}, "config"]}, ""),
    "getattr dunder": (
        "arange",
        {"target": "getattr", "args": [{"node": "model"}, "__class__"]},
        "",
    ),
    "getattr of three": (
        "arange",
        {"target": "getattr", "args": [{"node": "model"}, "T", 1], "kwargs": {}},
        "",
    ),
    "grad mode": ("arange", {"target": "torch.set_grad_enabled", "args": ["yes"]}, ""),
    "autocast": ("arange", {"target": "torch.enter_autocast", "args": ["cpu", None, 1, 1]}, ""),
    "autocast's end": (
        "arange",
        {"target": "torch.exit_autocast", "args": [{"node": "model"}]},
        "",
    ),
}


@pytest.mark.parametrize("attack", CALLS)
def test_calls(attack: str, saved: Path) -> None:
    name, values, place = CALLS[attack]

    def change(document: Any) -> None:
        record = node(document, name)
        record.pop("kwargs", None) if attack.startswith(("getattr", "grad", "autocast")) else None
        record.update(values)

    edit(saved / "graph.json", change)
    text = refused(saved, "graph.json.blocks[0].plans[0].nodes")
    assert place in text


@pytest.mark.parametrize(
    "reference",
    [
        "builtins:eval",
        "os:system",
        "transformers.models.llama.modeling_llama:LlamaModel",
        "transformers.models.llama.modeling_llama:apply_rotary_pos_emb",
        "transformers.models.llama.modeling_llama:torch",
        "transformers.models.gemma.modeling_gemma:eager_attention_forward",
        "transformers.models.llama.modeling_llama:eager_attention_forward.__globals__",
        "transformers.models.llama.configuration_llama:eager_attention_forward",
        {"node": "input_ids"},
    ],
)
def test_functions_for_attention(reference: Any, saved: Path) -> None:
    def change(document: Any) -> None:
        record = node(document, "attention")
        record["kwargs"]["default"] = reference

    edit(saved / "graph.json", change)
    refused(saved, "graph.json.blocks[0].plans[0].nodes")


def test_an_attention_implementation_of_a_hub(saved: Path) -> None:
    def change(document: Any) -> None:
        node(document, "attention")["kwargs"]["implementation"] = "kernels-community/x"

    edit(saved / "graph.json", change)
    assert "kernels-community" in refused(saved, "graph.json.blocks[0].plans[0].nodes")


@pytest.mark.parametrize(
    "guard",
    [
        SYSTEM + " == 0",
        "batch.__class__ == 1",
        "(lambda: 1)() == 1",
        "[x for x in (1,)] == 1",
        "open('x', 'w') == 1",
        "batch if exec('1') else sequence",
        "(x := 1) == 1",
        "f'{batch}' == 1",
        "batch[0] == 1",
        "other > 3",
        "math.__loader__ == 1",
        "math.factorial(sequence) > 1",
        "max(*[1]) > 1",
        "max(batch, key=exec) > 1",
        "sequence ** 99999 > 1",
        "'a' * sequence == 1",
        "1) or exec('x'",
        "sequence > 1\nimport os",
        "-" * 400 + "1",
        "1 + " * 400 + "1",
        "",
    ],
)
def test_guards_over_sizes(guard: str, saved: Path) -> None:
    edit(saved / "graph.json", lambda d: guards_in(d)["sizes"].append(guard))
    refused(saved, "graph.json.blocks[0].plans[0].guards.sizes[0]")


def sizes_in(document: Any) -> Any:
    """The sizes of the ids."""
    return guards_in(document)["arguments"]["input_ids"]["tensor"]["sizes"]


def test_names_of_sizes_and_inputs(saved: Path) -> None:
    for change in (
        lambda d: sizes_in(d).__setitem__(0, "min"),
        lambda d: sizes_in(d).__setitem__(0, "a b"),
        lambda d: sizes_in(d).__setitem__(0, -1),
        lambda d: guards_in(d)["arguments"].update({"x'] or exec('": {"value": 1}}),
        lambda d: guards_in(d)["hints"].update(batch="exec"),
        lambda d: guards_in(d)["autocast"].update({"os": None}),
        lambda d: guards_in(d)["arguments"].update(a={"value": {"node": "input_ids"}}),
    ):
        whole = (saved / "graph.json").read_bytes()
        edit(saved / "graph.json", change)
        refused(saved, "graph.json.blocks[0].plans[0].guards")
        (saved / "graph.json").write_bytes(whole)


def test_strings_in_arguments_stay_strings(saved: Path) -> None:
    text = "'); __import__('os').system('x'); ('"

    def change(document: Any) -> None:
        guards_in(document)["arguments"]["mode"] = {"value": text}
        node(document, "attention")["kwargs"]["sliding_window"] = text
        node(document, "attention")["kwargs"]["other"] = {"dict": {"a": text}}

    edit(saved / "graph.json", change)
    with watched() as events:
        loaded = load(saved)
    assert events == []
    assert repr(text) in loaded.code and text not in loaded.code.replace(repr(text), "")
