"""liger_fx.to_folder: Python source that computes the same bits in a process without the tracer."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_fx
from liger_fx.errors import SaveError
from liger_fx.source.statements import Statements
from tests.storage import custom
from tests.storage.files import contents, run_python
from tests.support.families import FAMILIES, build, make_inputs
from tests.support.marks import slow_but
from tests.tracing.custom import AutocastRegion, InPlace, NoGradRegion

RUN = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import graph
model = graph.load()
given = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    result = model(**given["inputs"])
tracer = ("tracer", "recorder", "patches", "fakes", "retry", "guards")
names = [m for m in sys.modules if m.startswith("liger_fx.")]
print(json.dumps({
    "same": torch.equal(result.logits, given["logits"]),
    "class": [cls.__module__ for cls in type(model).__mro__[:2]],
    "tracing": [m for m in names if m.endswith(tracer) or m.startswith(("liger_fx.engine",
        "liger_fx.api", "liger_fx.model", "liger_fx.storage"))],
    "refused": [refused(model, given["inputs"], change) for change in (
        lambda i: i.update(input_ids=i["input_ids"].int()),
        lambda i: i.update(attention_mask=i["attention_mask"][:, :-1]),
        lambda i: model.train(),
    )],
}))
"""
REFUSED = """
def refused(model, inputs, change):
    inputs = dict(inputs)
    change(inputs)
    try:
        model(**inputs)
    except ValueError as error:
        return "traced for other calls" in str(error)
"""


@pytest.mark.parametrize("name", slow_but(("llama",), ("llama", "qwen2", "gemma3_text")))
def test_a_fresh_process_computes_the_same_bits_without_the_tracer(
    name: str, tmp_path: Path
) -> None:
    opt = liger_fx.optimize(build(name))
    liger_fx.to_folder(opt, tmp_path / "graph")
    inputs = make_inputs(opt, pad=True)
    torch.save({"inputs": inputs, "logits": opt(**inputs).logits.detach()}, tmp_path / "given")
    found = run_python(REFUSED + RUN, tmp_path, tmp_path / "given")
    modelling = type(opt).__module__
    assert found == {
        "same": True,
        "class": ["graph.module", modelling],
        "tracing": [],
        "refused": [True, True, True],
    }


def load_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(folder.parent)
    for name in (folder.name, f"{folder.name}.module"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module(folder.name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = liger_fx.optimize(build(name))
    liger_fx.to_folder(opt, tmp_path / f"graph_of_{name}")
    model = load_package(tmp_path / f"graph_of_{name}", monkeypatch).load()
    inputs = make_inputs(opt, pad=True)
    assert torch.equal(model(**inputs).logits, opt(**inputs).logits)
    assert list(model.state_dict()) == list(opt.state_dict())
    named = [type(m).__name__ for m in opt.modules() if type(m).__module__.startswith("liger_fx.m")]
    assert named == [
        type(m).__name__ for m in model.modules() if type(m).__module__.startswith("liger_fx.m")
    ]
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))


def test_it_is_written_to_be_read(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"))
    liger_fx.to_folder(opt, tmp_path / "graph", "Readable")
    text = (tmp_path / "graph" / "module.py").read_text()
    assert "class Readable(transformers.LlamaForCausalLM):" in text
    assert "input_ids is int64[batch, sequence] on cpu" in text
    assert "        # model.layers.1.self_attn\n" in text
    assert "self.model.layers[1].input_layernorm(" in text
    assert "with torch.set_grad_enabled(False):\n" in text
    assert "weight=self.model.layers[0].input_layernorm.weight," in text
    assert "CausalLMOutputWithPast(logits=lm_head" in text
    assert max(map(len, text.splitlines())) < 180


def test_a_graph_it_cannot_make_again_and_other_folders(tmp_path: Path) -> None:
    opt = liger_fx.optimize(custom.Net(0.5).eval(), (torch.randn(3, 8),))
    with pytest.raises(SaveError, match="Net is no model class of transformers"):
        liger_fx.to_folder(opt, tmp_path / "graph")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "module.py").write_text("mine")
    (tmp_path / "other" / "mine.py").write_text("mine")
    llama = liger_fx.optimize(build("llama"))
    before = contents(tmp_path)
    with pytest.raises(SaveError, match="holds something else"):
        liger_fx.to_folder(llama, tmp_path / "other")
    with pytest.raises(SaveError, match="no name for a class"):
        liger_fx.to_folder(llama, tmp_path / "graph", "import os; x")
    assert contents(tmp_path) == before
    liger_fx.to_folder(llama, tmp_path / "graph")
    with pytest.raises(SaveError, match="holds something else"):
        liger_fx.save(llama, tmp_path / "graph")
    liger_fx.to_folder(llama, tmp_path / "graph")


@pytest.mark.parametrize("module", [NoGradRegion(), AutocastRegion(), InPlace()])
def test_regions_and_writes_in_place_are_statements(module: torch.nn.Module) -> None:
    x = torch.randn(3, 4)
    traced = liger_fx.trace(module.eval(), (x,))
    body = "\n".join(f"    {line}" for line in Statements(traced.graph).lines())
    source = f"def forward(self, x):\n{body}\n"
    ast.parse(source)
    scope: dict[str, Any] = {"torch": torch}
    exec(source, scope)
    assert torch.equal(scope["forward"](traced, x.clone()), module(x.clone()))
    assert ("with torch." in source) == ("Region" in type(module).__name__)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
