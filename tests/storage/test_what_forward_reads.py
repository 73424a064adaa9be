"""What a graph was traced from is known again; what forward cannot read may be anything.

A model that was read from a checkpoint or trained is the same model; another eps, activation,
function or constant of its code is not.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.models.llama.modeling_llama as modeling_llama
from torch import nn

import liger_fx
from liger_fx.errors import LoadError, SaveError
from liger_fx.model.block import Block
from liger_fx.storage.original import Original
from liger_fx.tiny import tiny_model
from tests.families.test_trainer import losses
from tests.storage import custom
from tests.support.families import build, make_inputs

FOUND = ("llama", "qwen2", "gemma2", "gpt2", "bert")


@pytest.mark.parametrize("name", FOUND)
def test_models_from_a_checkpoint_are_saved_and_bound(name: str, tmp_path: Path) -> None:
    made = tiny_model(name, layers=1)
    if name == "qwen2":
        made = build(name)  # tied weights
    made.save_pretrained(tmp_path / "checkpoint")
    read = type(made).from_pretrained(tmp_path / "checkpoint").eval()
    opt = liger_fx.optimize(read)
    call = {"input_ids": torch.randint(3, 100, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    liger_fx.save(opt, tmp_path / "whole")
    loaded = liger_fx.load(tmp_path / "whole")
    assert torch.equal(loaded(**call).logits, opt(**call).logits)
    liger_fx.save(liger_fx.optimize(made), tmp_path / "bare", weights=False)
    bound = liger_fx.load(tmp_path / "bare", model=read)
    assert torch.equal(bound(**call).logits, opt(**call).logits)
    assert len(loaded.plans) == len(bound.plans) == len(opt.plans)


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_trained_model_is_saved(options: dict[str, Any], tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama"))
    losses(opt, tmp_path / "trainer", **options)
    inputs = make_inputs(opt)
    vars(opt.eval()).pop("forward", None)  # accelerate's autocast, around the model
    wanted = opt(**inputs).logits
    liger_fx.save(opt, tmp_path / "a")
    assert torch.equal(liger_fx.load(tmp_path / "a")(**inputs).logits, wanted)


def test_attributes_that_no_code_reads_do_not_count(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama", num_hidden_layers=1))
    opt.note = "mine"
    opt.lock = os.scandir  # no text tells what it does, and nothing asks
    opt.model.layers[0].self_attn.seen = object()
    liger_fx.save(opt, tmp_path / "a")
    assert not hasattr(liger_fx.load(tmp_path / "a"), "note")


@pytest.mark.parametrize("name", ["llama", "big_bird", "t5gemma"])
def test_what_forward_reads_of_a_model_and_what_not(name: str) -> None:
    code = Original(tiny_model(name, layers=1)).code
    assert code.reads("config") and code.reads("loss_type")
    for unread in ("_use_kernels", "_weight_conversions", "_is_accelerate_prepared", "is_quantized",
                   "name_or_path", "generation_config", "_tp_plan", "hf_device_map"):  # fmt: skip
        assert not code.reads(unread), unread


def set_eps(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def set_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def set_norm(model: Any) -> None:
    model.model.norm = nn.RMSNorm(model.config.hidden_size, eps=1e-6)


def set_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x * 2


@pytest.mark.parametrize(
    "change, said",
    [
        (set_eps, r"'model\.norm' is not.*variance_epsilon is 0\.5 in the model, 1e-06 here"),
        (set_activation, r"'model\.layers\.0\.mlp\.act_fn' is not the .*SiLU.* but a .*ReLU"),
        (set_norm, r"'model\.norm' is not the .*LlamaRMSNorm.* but a .*normalization\.RMSNorm"),
        (set_forward, r"'model\.layers\.0\.mlp' is not.*attribute forward is .* absent here"),
    ],
)
def test_modules_that_were_replaced_are_compared(
    change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    opt = liger_fx.optimize(build("llama", num_hidden_layers=1))
    liger_fx.save(opt, tmp_path / "a", weights=False)
    model = build("llama", num_hidden_layers=1)
    change(model)
    with pytest.raises(LoadError, match=said):
        liger_fx.load(tmp_path / "a", model=model)
    if change is not set_forward:
        with pytest.raises(SaveError, match=r"could not be loaded again .*model\..*is not the"):
            liger_fx.save(liger_fx.optimize(model), tmp_path / "b")


def test_what_was_replaced_is_known_after_copies_and_loading(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build("llama", num_hidden_layers=1))
    liger_fx.save(opt, tmp_path / "a")
    wanted = (tmp_path / "a" / "graph.json").read_bytes()
    again = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), liger_fx.load(tmp_path / "a")]
    for i, twin in enumerate(again):
        liger_fx.save(twin, tmp_path / str(i))
        assert (tmp_path / str(i) / "graph.json").read_bytes() == wanted


def bind(saved: nn.Module, other: nn.Module, x: torch.Tensor, folder: Path) -> Block:
    liger_fx.save(liger_fx.trace(saved.eval(), (x,)), folder / "graph", weights=False)
    return liger_fx.load(folder / "graph", model=other.eval())


def scaled_by(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * number


@pytest.mark.parametrize(
    "make, other, attribute",
    [
        (lambda: custom.Settings(scale=1.0), lambda: custom.Settings(scale=3.0), "settings"),
        (lambda: custom.Slots(1.0), lambda: custom.Slots(3.0), "settings"),
        (lambda: custom.Plain([1.0, 2]), lambda: custom.Plain([1.0, 3]), "settings"),
    ],
)
def test_objects_count_by_what_they_hold(
    make: Any, other: Any, attribute: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 8)
    loaded = bind(custom.Held(make()), custom.Held(make()), x, tmp_path)
    assert torch.equal(loaded(x), custom.Held(make())(x))
    with pytest.raises(LoadError, match=f"'' is not the Held .*attribute {attribute} is"):
        liger_fx.load(tmp_path / "graph", model=custom.Held(other()).eval())


@pytest.mark.parametrize(
    "make, other",
    [
        (functools.partial(F.leaky_relu, negative_slope=0.1), 0.9),
        (scaled_by(1.0), scaled_by(5.0)),
        (F.relu, F.silu),
    ],
    ids=["partial", "closure", "function"],
)
def test_functions_count_by_what_they_are_given(make: Any, other: Any, tmp_path: Path) -> None:
    if isinstance(other, float):
        other = functools.partial(F.leaky_relu, negative_slope=other)
    x = torch.randn(3, 8)
    bind(custom.Applies(make), custom.Applies(make), x, tmp_path)
    with pytest.raises(LoadError, match="attribute function is"):
        liger_fx.load(tmp_path / "graph", model=custom.Applies(other).eval())


def test_what_no_text_tells_is_refused_if_forward_reads_it(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    traced = liger_fx.trace(custom.Held(custom.Opaque(2.0)).eval(), (x,))
    with pytest.raises(SaveError, match=r"attribute settings of the model \(Held\) is a .*Opaque"):
        liger_fx.save(traced, tmp_path / "graph", weights=False)
    assert not list(tmp_path.iterdir())


HELPED = """
from torch import nn

import changing_help
from changing_help import SCALE


class Net(nn.Module):
    more = 2.5

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * SCALE * changing_help.factor() * self.more
"""
HELP = """
SCALE = 1.5


def factor():
    return 2.0
"""


def import_helped(folder: Path, text: str, patch: pytest.MonkeyPatch) -> Any:
    """A new Net whose helpers are of that text, as a new process would import it."""
    (folder / "changing_help.py").write_text(text)
    (folder / "changing_helped.py").write_text(HELPED)
    patch.syspath_prepend(folder)
    patch.setattr(sys, "dont_write_bytecode", True)
    for name in ("changing_help", "changing_helped"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    torch.manual_seed(0)
    return importlib.import_module("changing_helped").Net().eval()


@pytest.mark.parametrize(
    "change, named", [(("1.5", "7.5"), "changing_help"), (("2.0", "9.0"), "changing_help")]
)
def test_helpers_of_other_modules_are_noticed(
    change: tuple[str, str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 4)
    model = import_helped(tmp_path, HELP, monkeypatch)
    bind(model, import_helped(tmp_path, HELP, monkeypatch), x, tmp_path)
    changed = import_helped(tmp_path, HELP.replace(*change), monkeypatch)
    with pytest.raises(LoadError, match=f"has changed .*{named}"):
        liger_fx.load(tmp_path / "graph", model=changed)


def test_a_file_edited_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    model = import_helped(tmp_path, HELP, monkeypatch)
    bind(model, model, x, tmp_path)
    (tmp_path / "changing_help.py").write_text(HELP.replace("2.0", "5.0"))
    with pytest.raises(LoadError, match="has changed .changing_help"):
        liger_fx.load(tmp_path / "graph", model=model)
    importlib.reload(sys.modules["changing_help"])
    with pytest.raises(LoadError, match="has changed .changing_help"):
        liger_fx.load(tmp_path / "graph", model=model)
    (tmp_path / "changing_help.py").write_text(HELP)
    importlib.reload(sys.modules["changing_help"])
    liger_fx.load(tmp_path / "graph", model=model)


def other_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("where", ["method", "text"])
def test_a_patched_class_is_noticed(
    where: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = liger_fx.load(saved)
    liger_fx.save(opt, tmp_path / "bare", weights=False)
    model = build("llama", num_hidden_layers=1)
    liger_fx.load(tmp_path / "bare", model=model)
    if where == "method":
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", other_mlp)
    else:
        scope = vars(modeling_llama).copy()
        exec("def forward(self, x):\n    return self.down_proj(self.up_proj(x))", scope)
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", scope["forward"])
    for given in ({}, {"model": model}):
        with pytest.raises(LoadError, match=r"has changed .*modeling_llama\.LlamaMLP\.forward"):
            liger_fx.load(tmp_path / "bare" if given else saved, **given)
