"""Attacks by texts that become part of Python source: they stay names, literals and comments."""

from __future__ import annotations

import ast
import builtins
import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import liger_fx
from liger_fx.errors import LoadError, SaveError
from liger_fx.model.block import Block
from liger_fx.source import folder
from liger_fx.source.folder import to_folder
from liger_fx.source.statements import Statements
from liger_fx.storage.save import Group, wanted_tensors
from liger_fx.storage.weights import describe
from liger_fx.tracing import leaves
from liger_fx.tracing.call import Constant
from tests.storage import custom
from tests.storage.files import edit, guards_in, plan_in, run_python
from tests.storage.hostile import refused
from tests.storage.test_to_folder import load_package
from tests.support.families import build, make_inputs

CODE = '__import__("pathlib").Path("OWNED").write_text("x")'
TEXTS = [
    f'"""; {CODE}; """', f"'); {CODE}; ('", f"\n{CODE}\n#", f"\r{CODE}", f"\x0c\n{CODE}",
    f"\u2028{CODE}", f"\x85{CODE}", f"x\\\n{CODE}", f"}}{{{CODE}", "\\", '"', "'", '"""', "{",
    "{0}",
    "# coding: utf-7", "\x00", "\ud800", "a b", "1", "007", "", "class", "None", "__debug__",
    "self", "torch", "transformers", "load", "HERE", "super", "model", "input_ids",
    "LigerRMSNorm", "\xe9",
]  # fmt: skip
MODULES = {
    "pathlib", "torch", "transformers", "liger_fx.modules", "liger_fx.tracing", "safetensors.torch",
    "operator", "math",
}  # fmt: skip
CALLED = {
    "super", "dict", "enumerate", "sorted", "setattr", "getattr", "slice", "float", "ValueError",
    "Path", "load_file", "_check_given",
}  # fmt: skip


def check(text: str, class_name: str) -> None:
    """The source has the statements that to_folder writes, and calls nothing else."""
    tree = ast.parse(text)
    assert [type(s) for s in tree.body if not isinstance(s, ast.Import | ast.ImportFrom)] == [
        ast.Expr, ast.Assign, ast.ClassDef, ast.FunctionDef, ast.FunctionDef,
    ]  # fmt: skip
    assert ast.get_docstring(tree) and isinstance(tree.body[0], ast.Expr)
    (made,) = (s for s in tree.body if isinstance(s, ast.ClassDef))
    assert made.name == class_name
    named = {name for name in vars(liger_fx.modules) if name.startswith("Liger")}
    for part in ast.walk(tree):
        if isinstance(part, ast.Import):
            assert {alias.name for alias in part.names} <= MODULES
        elif isinstance(part, ast.ImportFrom):
            assert part.module in MODULES or str(part.module).startswith("transformers.m")
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
            assert part.func.id in CALLED | named | {class_name, "CausalLMOutputWithPast", "self"}
        elif isinstance(part, ast.Name):
            assert part.id not in vars(builtins) or part.id in CALLED, part.id
        elif isinstance(part, ast.Attribute):
            assert not part.attr.startswith("__") or part.attr == "__init__"
        else:
            assert not isinstance(part, ast.Lambda | ast.Global | ast.AsyncFunctionDef | ast.Await)


def source(opt: Block, class_name: str) -> str:
    plan = opt.plans[0]
    text = folder._source(
        opt, plan, describe(opt, wanted_tensors([Group([""], (), {0: plan})])), class_name
    )
    folder.check_source(text, class_name)
    return text


def put(opt: Block, place: str, text: str) -> None:
    """Write ``text`` into a place of the graph or the model that becomes part of the source."""
    plan = opt.plans[0]
    nodes = {n.op: n for n in reversed(plan.graph.nodes)}
    guards = plan.guards = copy.deepcopy(plan.guards)
    if place == "constant":
        guards.call.arguments["mode"] = Constant(text)
    elif place == "name of a constant":
        guards.call.arguments[text] = Constant(1)
    elif place == "guard":
        plan.guards = replace(guards, sizes=(text,))
    elif place == "size":
        spec = guards.call.tensors["input_ids"]
        guards.call.arguments["input_ids"] = replace(spec, sizes=(text, 7))
    elif place == "input":
        arguments = guards.call.arguments
        arguments[text] = arguments.pop("input_ids")
    elif place == "autocast":
        guards.autocast[text] = torch.float16
    elif place == "module of a node":
        nodes["call_function"].meta["module"] = text
    elif place == "name of a node":
        nodes["call_function"].name = text
    elif place == "method":
        nodes["call_method"].target = text
    elif place == "path":
        nodes["call_module"].target = text
    elif place == "argument":
        nodes["call_function"].args = (text, {text: [text]}, slice(text, None))
    elif place == "keyword":
        nodes["call_method"].kwargs = {text: text}
    elif place == "output class":
        (output,) = plan.graph.find_nodes(op="call_function", target=leaves.model_output)
        output.args = (f"{text}:{text}",)
    elif place == "config":
        opt.config._attn_implementation_internal = text
    elif place == "name of a parameter":
        parameters = opt.model.norm._parameters
        parameters[text] = parameters.pop("weight")
    elif place == "name of a child":
        opt.model.add_module(text.replace(".", "_") or "x", opt.model.norm)  # type: ignore[arg-type]


PLACES = [
    "constant", "name of a constant", "guard", "size", "input", "autocast", "module of a node",
    "name of a node", "method", "path", "argument", "keyword", "output class", "config", "class",
    "name of a parameter", "name of a child",
]  # fmt: skip


def outcome(opt: Block, place: str, text: str) -> str:
    """``source`` of a copy with ``text`` put in; nothing for a SaveError."""
    twin = copy.deepcopy(opt)
    put(twin, place, text)
    class_name = text if place == "class" else "Graph"
    try:
        found = source(twin, class_name)
    except SaveError as error:
        assert len(str(error)) < 700 and str(error).isprintable()
        return ""
    check(found, class_name)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_code_put_where_a_text_stands(place: str, llama: Block) -> None:
    check(source(llama, "Graph"), "Graph")
    written = [text for text in TEXTS if outcome(llama, place, text)]
    if place in ("constant", "argument", "config", "module of a node", "autocast", "path"):
        assert any(CODE in text for text in written)  # as a literal, or behind a #
    elif place not in ("name of a parameter", "name of a child", "name of a constant"):
        assert not any(CODE in text for text in written)


@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    place=st.sampled_from(PLACES),
    text=st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from(TEXTS), max_size=3).map("".join),
        st.text(alphabet="\"'\\\n\r\x0c\u2028#{}();ax0_.", max_size=30),
    ),
)
def test_any_text_anywhere(place: str, text: str, llama: Block) -> None:
    outcome(llama, place, text)


def test_a_constant_that_closes_the_docstring(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    code = f'"""; __import__("pathlib").Path({str(mark)!r}).write_text("x"); """'
    use_cache = {"value": code}
    edit(saved / "graph.json", lambda d: guards_in(d)["arguments"].update(use_cache=use_cache))
    liger_fx.to_folder(liger_fx.load(saved), tmp_path / "graph")
    run = "import json, sys\nsys.path.insert(0, sys.argv[1])\nimport graph\nprint(json.dumps(1))"
    assert run_python(run, tmp_path) == 1 and not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["torch", "transformers", "load", "HERE", "super", "LigerRMSNorm", "Path", "load_file", "model"]
    + ["CausalLMOutputWithPast", "class", "None", "__debug__", "a b", "", "self", "leaves"],
)
def test_names_of_the_class_that_the_source_needs(name: str, llama: Block, tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="no name for a class|the source itself needs"):
        to_folder(llama, tmp_path / "graph", name)
    assert not (tmp_path / "graph").exists()


def test_other_arguments_are_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = liger_fx.optimize(build("llama"))
    liger_fx.to_folder(opt, tmp_path / "graph_alone")
    model = load_package(tmp_path / "graph_alone", monkeypatch).load()
    inputs = make_inputs(opt)
    assert torch.equal(model(**inputs, labels=None).logits, opt(**inputs).logits)
    with pytest.raises(ValueError, match="with this use_cache; generate, .* liger_fx.load"):
        model(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="with this past_key_values; generate,"):
        model.generate(inputs["input_ids"], max_new_tokens=2)


def test_constants_of_the_call_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = liger_fx.optimize(build("llama"))
    inputs = make_inputs(opt)
    constant = liger_fx.optimize(build("llama"), {**inputs, "use_cache": False})
    liger_fx.to_folder(constant, tmp_path / "graph_constant")
    model = load_package(tmp_path / "graph_constant", monkeypatch).load()
    assert torch.equal(
        model(**inputs, use_cache=False).logits, constant(**inputs, use_cache=False).logits
    )
    with pytest.raises(ValueError, match="with this use_cache"):
        model(**inputs, use_cache=True)


class _Powers(torch.nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (-2) ** input - -1


def test_negative_numbers_and_arguments_with_names_of_builtins() -> None:
    x = torch.arange(4.0)
    graph = liger_fx.trace(_Powers(), (x,)).graph
    lines = "\n    ".join(Statements(graph).lines())
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def forward(self, input):\n    {lines}\n", scope)
    assert torch.equal(scope["forward"](None, x), _Powers()(x))


@pytest.mark.parametrize(
    "name, value, place",
    [
        ("use_cache", [1], ".use_cache.value: [1] is no plain argument"),
        ("use_cache", {"dict": {"a": 1}}, ".use_cache.value: "),
        ("use_cache", {"node": "input_ids"}, ".use_cache.value"),
        ("__class__", 1, ".__class__: '__class__' is no name"),
        ("a b", 1, ".'a b'"),
    ],
)
def test_constants_that_are_no_arguments(name: str, value: Any, place: str, saved: Path) -> None:
    argument = {name: {"value": value}}
    edit(saved / "graph.json", lambda d: guards_in(d)["arguments"].update(argument))
    refused(saved, f"graph.json.blocks[0].plans[0].guards.arguments{place}")


def test_constants_that_the_forward_does_not_take(tmp_path: Path) -> None:
    model = custom.Net(0.5).eval()
    liger_fx.save(liger_fx.optimize(model, (torch.randn(3, 8),)), tmp_path / "graph", weights=False)
    for change in (
        lambda arguments: arguments.update(code={"value": 1}),
        lambda arguments: arguments.update(code=arguments.pop("x")),
    ):
        folder = Path(shutil.copytree(tmp_path / "graph", tmp_path / "damaged"))
        edit(folder / "graph.json", lambda d, change=change: change(guards_in(d)["arguments"]))  # type: ignore[misc]
        edit(folder / "graph.json", rename_input)
        with pytest.raises(LoadError, match="the model's forward takes no 'code'"):
            liger_fx.load(folder, model=model)
        shutil.rmtree(folder)


def rename_input(document: Any) -> None:
    plan = plan_in(document)
    record = next(n for n in plan["nodes"] if n["op"] == "placeholder")
    (record["target"],) = (n for n, s in plan["guards"]["arguments"].items() if "tensor" in s)
