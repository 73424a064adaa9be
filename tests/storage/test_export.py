"""liger_fx.export: a .pt2 with our operators, of any batch and length, in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.errors import SaveError, UsageError
from tests.storage import custom
from tests.storage.files import contents, run_python
from tests.support.families import build, make_inputs
from tests.support.marks import slow_but
from tests.tracing.custom import ReadsLength

SIZES = ((3, 11), (1, 7), (2, 1), (1, 1), (4, 40), (2, 130))
RUN = """
import json, sys
import torch
import liger_fx.modules
if len(sys.argv) > 3:
    import importlib
    importlib.import_module(sys.argv[3])
program = torch.export.load(sys.argv[1])
run = program.module()
same = []
for given in torch.load(sys.argv[2], weights_only=True):
    same.append(torch.equal(run(**given["inputs"])["logits"], given["logits"]))
print(json.dumps({
    "same": same,
    "ops": sorted({str(n.target) for n in program.graph.nodes if "liger_fx" in str(n.target)}),
    "transformers": "transformers" in sys.modules,
}))
"""


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "liger_fx." in str(n.target)]


@pytest.mark.parametrize("name", slow_but(("llama",), ("llama", "gemma2", "phi3", "mixtral")))
def test_a_fresh_process_computes_the_same_bits_at_any_size(name: str, tmp_path: Path) -> None:
    opt = liger_fx.optimize(build(name))
    program = liger_fx.export(opt, tmp_path / "model.pt2")
    given = []
    for batch, length in SIZES:
        inputs = make_inputs(opt, batch, length, pad=length > 3)
        with torch.no_grad():
            given.append({"inputs": inputs, "logits": opt(**inputs, use_cache=False).logits})
    torch.save(given, tmp_path / "given")
    others = ["transformers.integrations.moe"] if name == "mixtral" else []
    found = run_python(RUN, tmp_path / "model.pt2", tmp_path / "given", *others)
    assert found["same"] == [True] * len(SIZES)
    assert found["transformers"] == bool(others)
    assert set(found["ops"]) == set(operators(program))
    # each named module is one node: two norms a layer and more, one rotary, one product
    assert operators(program).count("liger_fx.rms_norm.default") == sum(
        type(m).__name__ == "LigerRMSNorm" for m in opt.modules()
    )
    assert operators(program).count("liger_fx.rope_pair.default") == opt.config.num_hidden_layers


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama")).train()
    before = str(opt), [p.requires_grad for p in opt.parameters()], dict(opt.state_dict())
    liger_fx.export(opt, tmp_path / "model.pt2")
    assert opt.training and len(opt.plans) == 1 and torch.is_grad_enabled()
    after = str(opt), [p.requires_grad for p in opt.parameters()], dict(opt.state_dict())
    assert before[:2] == after[:2]
    assert all(torch.equal(after[2][key], value) for key, value in before[2].items())


def test_what_the_code_asked_of_sizes_is_checked(tmp_path: Path) -> None:
    traced = liger_fx.trace(ReadsLength(), (torch.randn(3, 11),))
    run = liger_fx.export(traced, tmp_path / "model.pt2", (torch.randn(3, 11),)).module()
    x = torch.randn(5, 20)
    assert torch.equal(run(x=x), ReadsLength()(x))
    with pytest.raises((AssertionError, RuntimeError)):
        run(x=torch.randn(5, 8))  # the model would take its other branch


def test_inputs_of_one_size_must_have_one_size(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"))
    liger_fx.export(opt, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    inputs = make_inputs(opt)
    with pytest.raises((AssertionError, RuntimeError)):
        run(**{**inputs, "attention_mask": inputs["attention_mask"][:, :-1]})


def test_a_module_that_is_no_transformers_model(tmp_path: Path) -> None:
    model = custom.Net(0.5).eval()
    x = torch.randn(3, 8)
    opt = liger_fx.optimize(model, (x,))
    program = liger_fx.export(opt, tmp_path / "model.pt2", (x,))
    assert operators(program) == ["liger_fx.rms_norm.default"]
    y = torch.randn(17, 8)
    with torch.no_grad():
        assert torch.equal(program.module()(x=y), opt(y))


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = liger_fx.optimize(build("llama"))
    liger_fx.export(opt, tmp_path / "model.pt2")
    before = contents(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(SaveError, match="No space left"):
        liger_fx.export(opt, tmp_path / "model.pt2")
    assert contents(tmp_path) == before


FULL = """
import json, resource, sys, torch, liger_fx
from liger_fx.errors import SaveError
from liger_fx.tiny import tiny_model
opt = liger_fx.optimize(tiny_model("llama", layers=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    liger_fx.export(opt, sys.argv[1])
    print(json.dumps("written"))
except SaveError as error:
    print(json.dumps(str(error)))
"""


def test_a_disk_that_is_full_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("old")
    said = run_python(FULL, tmp_path / "model.pt2")
    assert "could not be written" in said and "too large" in said
    assert contents(tmp_path) == {"model.pt2": b"old"}


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    class Prints(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    traced = liger_fx.trace(Prints(), (torch.randn(3, 4),))
    with pytest.raises(UsageError, match="what optimize"):
        liger_fx.export(build("llama"), tmp_path / "model.pt2")
    try:
        run = liger_fx.export(traced, tmp_path / "model.pt2", (torch.randn(3, 4),)).module()
    except SaveError as error:
        assert "cannot be exported" in str(error) and not list(tmp_path.iterdir())
    else:
        x = torch.ones(2, 4)
        assert torch.equal(run(x=x), x * 8)
