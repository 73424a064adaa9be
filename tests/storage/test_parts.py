"""The parts by themselves: the safetensors format, named modules, values, expressions, JSON."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import liger_fx.modules
from liger_fx.codec import decode, encode
from liger_fx.errors import LoadError, SaveError
from liger_fx.storage import expressions, named_modules, targets, values
from liger_fx.storage.json_file import dump, parse
from liger_fx.storage.records import NamedModule
from liger_fx.storage.tensors import read_header, read_tensor, write_safetensors

TENSORS = {
    "matrix": torch.randn(3, 5),
    "bf16": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "transposed": torch.randn(4, 3).t(),
}


def bits(tensor: torch.Tensor) -> bytes:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return bytes(flat.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_what_is_written_the_safetensors_package_reads(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_safetensors(file, TENSORS)
    theirs = safetensors.torch.load_file(file)
    assert theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape
        assert bits(theirs[name]) == bits(tensor), name


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({k: t.contiguous() for k, t in TENSORS.items()}, file)
    entries = read_header(file)
    assert entries.keys() == TENSORS.keys()
    with file.open("rb") as opened:
        for name, entry in entries.items():
            ours = read_tensor(opened, entry)
            assert ours.dtype == TENSORS[name].dtype and ours.shape == TENSORS[name].shape
            assert bits(ours) == bits(TENSORS[name]), name


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.randn(4)
    write_safetensors(tmp_path / "a.safetensors", {"whole": whole, "part": whole[1:3]})
    theirs = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(theirs["whole"], whole) and torch.equal(theirs["part"], whole[1:3])


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="no torch.complex128, which x is"):
        write_safetensors(tmp_path / "a", {"x": torch.randn(2, dtype=torch.complex128)})


MADE: dict[str, dict[str, Any]] = {
    "LigerAddLayerNorm": {"width": 8, "eps": 1e-5, "offset": 1.0, "cast": "autocast"},
    "LigerLayerNorm": {"width": 8, "eps": 1e-5, "weight_name": "weight", "bias_name": "bias"},
    "LigerAddRMSNorm": {"width": 8, "eps": None, "weight_name": "weight"},
    "LigerExperts": {"activation": "gelu", "transposed": True},
    "LigerFusedLinearCrossEntropy": {"reduction": "sum", "softcap": 30.0, "biased": True},
    "LigerRMSNorm": {"width": 8, "eps": 1e-5, "offset": 1.0, "cast": "promote"},
    "LigerNormRotaryEmbedding": {"eps": None, "exchanged": True, "heads_dim": 2},
    "LigerQKNormRotaryEmbedding": {"eps": 1e-5, "offset": 1.0, "norm_cast": "promote"},
    "LigerRotaryEmbedding": {"interleaved_in": True, "half_tables": True, "rotary_dim": 4},
    "LigerSingleRotaryEmbedding": {"heads_dim": 2, "cast": "input", "head_dim": 8},
    "LigerSwiGLU": {"gate_first": False, "width": 3},
    "LigerGEGLU": {"activation": "gelu_tanh"},
    "LigerReGLU": {"activation": "relu_squared"},
    "LigerSigmoidGate": {"width": 3},
    "LigerSwiGLUMLP": {"gate": "g", "up": "u", "down": "d"},
    "LigerGEGLUMLP": {"gate_up": "g", "down": "d", "gate_first": False, "activation": "gelu_tanh"},
    "LigerReGLUMLP": {"gate": "g", "up": "u", "down": "d"},
    "LigerMLP": {"fc1": "u", "fc2": "d", "activation": "gelu"},
}


@pytest.mark.parametrize("name", liger_fx.modules.__all__)
def test_every_named_module_is_made_again_from_its_options(name: str) -> None:
    cls = getattr(liger_fx.modules, name)
    parameters = inspect.signature(cls.__init__).parameters
    given = dict(MADE[name])
    original = nn.Module()
    for child in ("g", "u", "d"):
        original.add_module(child, nn.Linear(8, 8))
    original.weight, original.bias = (nn.Parameter(torch.ones(8)) for _ in range(2))
    original.gate_up_proj = nn.Parameter(torch.ones(3, 8, 4))
    original.down_proj = nn.Parameter(torch.ones(3, 2, 8))
    if "children" in parameters:
        used = [
            given[role] for role in ("gate", "up", "gate_up", "fc1", "down", "fc2") if role in given
        ]
        given["children"] = {child: original.get_submodule(child) for child in used}
    for role in ("weight", "bias", "gate_up_proj", "down_proj"):
        if role in parameters:
            given[role] = getattr(original, role)
    root = nn.Module()
    root.add_module("place", cls(**given))
    (written,) = json.loads(json.dumps(encode(named_modules.describe(root))))
    record = decode(NamedModule, written)
    named_modules.check(record)
    again = nn.Module()
    if record.children or record.parameters:
        again.add_module("place", original)
    named_modules.install(again, record)
    made: Any = again.get_submodule("place")
    assert type(made) is cls and made.extra_repr() == root.place.extra_repr()
    assert made.options() == root.place.options()
    assert set(made.options()) <= set(parameters)
    for path, parameter in root.named_parameters():
        assert again.get_parameter(path) is parameter


FLOATS = st.floats(allow_nan=False)
PLAIN = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | FLOATS | st.text(max_size=8)
FINITE = PLAIN.filter(lambda value: value not in (math.inf, -math.inf))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
TREES = st.recursive(
    PLAIN | DTYPES | st.just(...) | st.just(torch.device("cuda:1")) | st.just(torch.strided),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.from_regex(r"\A[a-z]{3,6}\Z"), inner, max_size=3).filter(
            lambda d: not {"def", "for", "from", "with", "pass", "elif", "else", "try"} & d.keys()
        )
        | st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_values_come_back_as_they_were(tree: Any) -> None:
    encoded = json.loads(json.dumps(values.encode(tree)))
    again = values.ValueReader({}, values.Devices()).read(encoded)
    assert again == tree and type(again) is type(tree)
    assert values.encode(again) == values.encode(tree)


@settings(max_examples=200, deadline=None)
@given(st.recursive(FINITE, lambda i: st.lists(i, max_size=3)
       | st.dictionaries(st.text(max_size=5), i, max_size=3), max_leaves=10))  # fmt: skip
def test_json_comes_back_and_is_canonical(value: Any) -> None:
    text = dump(value)
    assert json.loads(text) == value and parse(text) == value
    assert dump(json.loads(text)) == text


def test_nothing_callable_is_dangerous() -> None:
    harmful = {"load", "save", "compile", "hook", "apply", "map", "numpy", "storage", "pickle"}
    harmful |= {"open", "exec", "eval", "import", "jit", "script", "register", "library", "file"}
    for name in [*targets.FUNCTIONS, *targets.METHODS]:
        words = set(name.rpartition(".")[2].strip("_").split("_"))
        assert not words & harmful, name
        assert "__" not in name
    for name, function in targets.FUNCTIONS.items():
        assert callable(function) and targets.name_of(function) in targets.FUNCTIONS, name


@pytest.mark.parametrize(
    "text, names",
    [
        ("((8 + (-1)*(sequence % 8)) % 8) > 0", {"sequence"}),
        ("max(batch, 2) // 2 == min(sequence, 4)", {"batch", "sequence"}),
        (
            "math.ceil(sequence / 2) <= 512 and not (batch == 3 or batch == 5)",
            {"sequence", "batch"},
        ),
        ("(1 if batch > 2 else 0) == 1", {"batch"}),
        ("sequence**2 < 10000", {"sequence"}),
    ],
)
def test_expressions_that_traces_make(text: str, names: set[str]) -> None:
    assert expressions.check(text, names) == text
    with pytest.raises(LoadError, match="no size"):
        expressions.check(text, names - {min(names)})
    assert str(expressions.read(text)) == text


def test_names_of_sizes_replace_symbols() -> None:
    opt = liger_fx.trace(nn.Flatten().eval(), (torch.randn(3, 4, 5),))
    call = opt.plans[0].guards.call
    names = expressions.SizeNames(opt.graph, {n: spec.sizes for n, spec in call.tensors.items()})
    specs = [n.meta["spec"] for n in opt.graph.nodes if "spec" in n.meta]
    written = {names.write(size) for spec in specs for size in spec.shape}
    assert {"input_0", "input_1", "input_1*input_2"} <= written


def test_a_node_of_another_graph_is_no_value() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert values.encode(node) == {"node": "x"}
    with pytest.raises(LoadError, match="no earlier node"):
        values.ValueReader({}, values.Devices()).read({"node": "x"})
