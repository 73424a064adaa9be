"""Attacks on the weights of the model that a graph is bound to: it may compute, not overwrite."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.errors import LoadError
from liger_fx.storage.targets import FUNCTIONS, METHODS
from liger_fx.storage.writes import is_in_place, makes_new
from tests.storage.files import edit, plan_in
from tests.storage.hostile import refused
from tests.support.families import build

Record = dict[str, Any]


def call(name: str, target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> Record:
    return {"name": name, "op": op, "target": target, "args": list(args), "kwargs": kwargs}


def method(name: str, target: str, *args: Any, **kwargs: Any) -> Record:
    return call(name, target, *args, op="call_method", **kwargs)


W = {"node": "zz_w"}
V = {"node": "zz_v"}
IDS = {"node": "input_ids"}
WEIGHT = {"name": "zz_w", "op": "get_attr", "target": "lm_head.weight"}
BUFFER = {"name": "zz_w", "op": "get_attr", "target": "model.rotary_emb.inv_freq"}
OUTPUT = "transformers.modeling_outputs:CausalLMOutputWithPast"
FIRST = call("zz_v", "operator.getitem", {"node": "zz_c"}, 0)
FILL = method("zz_f", "fill_", V, 0.5)

# What gives back memory of the weight: each is followed by a write.
VIEWS: dict[str, Record] = {
    "data": call("zz_v", "getattr", W, "data"),
    "T": call("zz_v", "getattr", W, "T"),
    "detach": method("zz_v", "detach", W),
    "detach function": call("zz_v", "torch.detach", W),
    "view": method("zz_v", "view", W, -1),
    "reshape": method("zz_v", "reshape", W, -1),
    "transpose": call("zz_v", "torch.transpose", W, 0, 1),
    "getitem": call("zz_v", "operator.getitem", W, 0),
    "expand": method("zz_v", "expand", W, 131, 56),
    "narrow": method("zz_v", "narrow", W, 0, 0, 1),
    "to": method("zz_v", "to", {"dtype": "float32"}) | {"args": [W, {"dtype": "float32"}]},
    "float": method("zz_v", "float", W),
    "contiguous": method("zz_v", "contiguous", W),
    "type_as": method("zz_v", "type_as", W, W),
    "real": call("zz_v", "getattr", W, "real"),
    "positive": call("zz_v", "torch.positive", W),
    "pos": call("zz_v", "operator.pos", W),
    "as_tensor": call("zz_v", "torch.as_tensor", W),
    "einsum": call("zz_v", "torch.einsum", "ij->ji", W),
    "dropout": call("zz_v", "torch.nn.functional.dropout", W, 0.0, False),
    "module": call("zz_v", "model.embed_tokens", W, op="call_module") | {"target": "model"},
}


def insert(folder: Path, *records: Record) -> None:
    edit(folder / "graph.json", lambda d: plan_in(d)["nodes"].__setitem__(slice(2, 2), records))


@pytest.mark.parametrize("view", VIEWS)
def test_writes_into_what_may_be_a_view_of_a_weight(view: str, saved: Path) -> None:
    insert(saved, WEIGHT, VIEWS[view], FILL)
    assert (
        "(zz_f): writes into"
        in (said := refused(saved, "graph.json.blocks[0].plans[0].nodes.zz_f"))
        or said
    )


PARTS: dict[str, list[Record]] = {
    "chunk": [call("zz_c", "torch.chunk", W, 2), FIRST],
    "split": [method("zz_c", "split", W, 2), FIRST],
    "unbind": [method("zz_c", "unbind", W), FIRST],
    "a list": [
        call("zz_c", "operator.add", [W], []),
        FIRST,
    ],
    "a list twice": [
        call("zz_c", "operator.mul", [W], 2),
        FIRST,
    ],
    "an output": [
        call("zz_c", "liger_fx.model_output", OUTPUT, logits=W),
        call("zz_v", "operator.getitem", {"node": "zz_c"}, "logits"),
    ],
    "views of views": [method("zz_c", "view", W, -1), method("zz_v", "t", {"node": "zz_c"})],
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_writes_into_parts(part: str, saved: Path) -> None:
    insert(saved, WEIGHT, *PARTS[part], FILL)
    refused(saved, "graph.json.blocks[0].plans[0].nodes.zz_f: writes into lm_head.weight")


WRITES: dict[str, Record] = {
    "fill_": method("zz_f", "fill_", W, 0.5),
    "copy_": method("zz_f", "copy_", W, 1.0),
    "requires_grad_": method("zz_f", "requires_grad_", W, False),
    "setitem": call("zz_f", "operator.setitem", W, 0, 0.5),
    "iadd": call("zz_f", "operator.iadd", W, 1),
    "imul": call("zz_f", "operator.imul", W, 0),
    "ipow": call("zz_f", "operator.ipow", W, 0),
    "out": call("zz_f", "torch.add", 1, 2, out=W),
    "out of several": call("zz_f", "torch.max", W, 0, out={"tuple": [W, W]}),
    "init": call("zz_f", "torch.nn.init.zeros_", W),
    "init by name": call("zz_f", "torch.nn.init.zeros_", tensor=W),
    "relu": call("zz_f", "torch.nn.functional.relu", W, True),
    "relu by name": call("zz_f", "torch.nn.functional.relu", inplace=True, input=W),
    "dropout": call("zz_f", "torch.nn.functional.dropout", W, 0.5, True, True),
    "computed option": call("zz_f", "torch.nn.functional.relu", W, IDS),
    "statistics": call("zz_f", "torch.nn.functional.batch_norm", 1, W, W, None, None, True),
    "statistics of torch": call(
        "zz_f", "torch.batch_norm", 1, None, None, W, W, True, 0.1, 1e-5, False
    ),
    "renormalised": call("zz_f", "torch.nn.functional.embedding", IDS, W, None, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("tensor", [WEIGHT, BUFFER], ids=["weight", "buffer"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_of_every_kind(write: str, tensor: Record, saved: Path) -> None:
    insert(saved, tensor, WRITES[write])
    refused(saved, f"graph.json.blocks[0].plans[0].nodes.zz_f: writes into {tensor['target']}")


HARMLESS: dict[str, list[Record]] = {
    "a copy": [method("zz_v", "clone", W), FILL],
    "a sum": [call("zz_v", "torch.add", W, 1), FILL],
    "a product": [call("zz_v", "operator.matmul", W, W), FILL],
    "relu": [call("zz_v", "torch.nn.functional.relu", W), FILL],
    "no option": [call("zz_v", "torch.nn.functional.relu", W, False), FILL],
    "statistics that are read": [
        call("zz_v", "torch.nn.functional.batch_norm", 1, W, W, None, None, False)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_writes_into_what_was_computed(kind: str, saved: Path) -> None:
    insert(saved, WEIGHT, *HARMLESS[kind])
    liger_fx.load(saved)


def test_a_given_model_stays_as_it_is(saved: Path) -> None:
    model = build("llama", num_hidden_layers=1)
    insert(saved, WEIGHT, VIEWS["data"], FILL)
    before = model.lm_head.weight.clone()
    with pytest.raises(LoadError, match="zz_f: writes into lm_head.weight, a tensor of the model"):
        liger_fx.load(saved, model=model)
    assert torch.equal(model.lm_head.weight, before)


def _memory(value: Any) -> set[int]:
    if isinstance(value, (tuple, list)):
        return set().union(*map(_memory, value))
    return {value.untyped_storage().data_ptr()} if isinstance(value, torch.Tensor) else set()


@pytest.mark.filterwarnings("ignore")
def test_methods_that_are_said_to_make_new_memory_do() -> None:
    square, numbers = torch.rand(4, 4), torch.arange(16).view(4, 4)
    found, tried = set(), set()
    arguments: list[tuple[Any, ...]]
    for name in sorted(name for name in METHODS if makes_new("call_method", name)):
        for x in (square, numbers, torch.ones(1, 1), torch.ones(4), torch.ones(4) > 0):
            arguments = [(), (1,), (0,), (x,), (1, 1), (0, x), (0, numbers[:1] * 0, x[:1]), ((),)]
            for given in arguments:
                try:
                    result = getattr(x, name)(*given)
                except Exception:
                    continue
                tried.add(name)
                if _memory(result) & _memory(x):
                    found.add((name, *given))
    assert found == set() and len(tried) > 120


def test_every_write_is_known() -> None:
    names = {name for name in METHODS if is_in_place("call_method", name)}
    assert {"fill_", "copy_", "zero_", "index_put_", "t_", "requires_grad_", "relu_"} <= names
    calls = [("call_method", name) for name in METHODS]
    calls += [("call_function", function) for function in FUNCTIONS.values()]
    assert not [call for call in calls if is_in_place(*call) and makes_new(*call)]
    assert is_in_place("call_function", nn.init.zeros_)
    assert is_in_place("call_function", operator.iand)
    assert not is_in_place("call_function", operator.and_)


def test_every_write_that_pytorch_tells_of_is_known() -> None:
    """The names say which operators write; the schemas of PyTorch say the same."""
    for name in METHODS:
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        firsts = [s.arguments[0] for s in schemas if str(s.arguments[0].type) == "Tensor"]
        writes = {bool(a.alias_info and a.alias_info.is_write) for a in firsts}
        assert not writes or writes == {is_in_place("call_method", name)}, name
