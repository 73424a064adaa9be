"""A saved graph in a process that has traced nothing: what runs there, and in what memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx
from liger_fx.model.block import Block
from tests.storage.files import run_python
from tests.support.families import build, make_inputs
from tests.support.marks import slow_but

LOAD_AND_RUN = """
import json, sys
import torch
torch.set_num_threads(1)
import liger_fx
from liger_fx.tracing.tracer import HFTracer
import liger_fx.engine.search as search
def never(*_):
    raise AssertionError("a trace or a search")
HFTracer.trace = search.search = never
opt = liger_fx.load(sys.argv[1])
given = torch.load(sys.argv[2], weights_only=True)
result = opt(**given["inputs"])
print(json.dumps({
    "same": torch.equal(result.logits, given["logits"]),
    "class": type(opt).__name__,
    "rules": [m for m in sys.modules if m.startswith("liger_fx.passes.")],
    "plans": len(opt.plans),
    "rewritten": len(opt.report.rewritten),
}))
"""


@pytest.mark.parametrize(
    "name", slow_but(("llama", "deepseek_v3"), ("llama", "qwen2", "gemma3_text", "deepseek_v3"))
)
def test_a_fresh_process_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    opt = liger_fx.optimize(build(name))
    liger_fx.save(opt, tmp_path / "graph")
    inputs = make_inputs(opt, pad=True)
    torch.save({"inputs": inputs, "logits": opt(**inputs).logits.detach()}, tmp_path / "given")
    found = run_python(LOAD_AND_RUN, tmp_path / "graph", tmp_path / "given")
    assert found == {
        "same": True,
        "class": type(opt).__name__,
        "rules": [],
        "plans": 1,
        "rewritten": len(opt.report.rewritten),
    }


MEMORY = """
import json, sys
import torch
torch.set_num_threads(1)
import liger_fx
def kib(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1])
liger_fx.load(sys.argv[1])  # what is imported and cached is not the weights'
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kib("VmRSS:")
opt = liger_fx.load(sys.argv[2])
after, peak = kib("VmRSS:"), kib("VmHWM:")
weights = sum(p.numel() * p.itemsize for p in opt.parameters()) / 1024
print(json.dumps([weights, after - before, peak - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_memory_is_the_weights(llama: Block, saved: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    liger_fx.save(liger_fx.optimize(LlamaForCausalLM(config).eval()), tmp_path / "large")
    weights, held, peak = run_python(MEMORY, saved, tmp_path / "large")
    assert weights > 400_000, "a few hundred MB"
    assert weights * 0.95 < held < weights * 1.1
    assert peak < weights * 1.1, f"{peak / weights:.2f} times the weights"


def test_saved_graphs_say_the_same_in_every_process(llama: Block, saved: Path) -> None:
    code = (
        "import sys, json, liger_fx; opt = liger_fx.load(sys.argv[1]);"
        "liger_fx.save(opt, sys.argv[2]); print(json.dumps(str(opt)))"
    )
    again = saved.parent / "again"
    assert run_python(code, saved, again) == str(llama)
    for file in saved.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((again / "graph.json").read_text())["schema"] == 2
