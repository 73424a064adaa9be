"""What a trace answered is guarded where it was asked, read when the graph runs, or refused."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SqueezeBertConfig,
    SqueezeBertModel,
)

import liger_fx
from liger_fx.errors import LigerFxError
from liger_fx.storage.targets import name_of
from tests.support.original import RIGHT, Small, beside

T = torch.Tensor


def rows(*sizes: int) -> tuple[T]:
    return (torch.randn(*sizes, 8),)


# -- sizes that decide what there is ---------------------------------------------------------------


def ranked(h: T) -> T:
    return h * (h.dim() + 1)


def squeezed_in_place(m: Any, x: T) -> T:
    h = m.lin(x) * 1
    h.squeeze_(0)
    return ranked(h)


def asked_after_a_kernel(m: Any, x: T) -> T:
    h = m.lin(x)
    # Their kernels ask the same of the size.
    _ = h.squeeze(), h + torch.ones(h.shape[0], 1), h.expand(h.shape[0], 8)
    return h * 3 if x.shape[0] == 1 else h


FLAT: dict[str, Any] = {
    "split": lambda m, x: torch.cat([m.lin(c).cumsum(0) for c in x.split(4)]),
    "split by a part of the size": lambda m, x: sum(
        i * c.sum(0) for i, c in enumerate(m.lin(x).split(max(x.shape[0] // 2, 1)))
    ),
    "chunk": lambda m, x: m.lin(x) * len(x.chunk(3)),
    "tensor_split": lambda m, x: sum(i * c.sum(0) for i, c in enumerate(m.lin(x).tensor_split(3))),
    "unbind": lambda m, x: sum(i * c for i, c in enumerate(m.lin(x).unbind())),
    "unfold": lambda m, x: sum(i * c for i, c in enumerate(m.lin(x).unfold(0, 1, 2).unbind(0))),
    "iteration": lambda m, x: sum(i * c for i, c in enumerate(m.lin(x))),
    "len": lambda m, x: m.lin(x) * len(x),
    "a number of a tensor": lambda m, x: m.lin(x) * int(torch.tensor(x.shape[0])),
    "range": lambda m, x: sum(i * m.lin(x)[i] for i in range(x.shape[0])),
    "what a kernel asked before": asked_after_a_kernel,
}
DEEP: dict[str, Any] = {
    "squeeze": lambda m, x: ranked(m.lin(x).squeeze()),
    "squeeze of one dimension": lambda m, x: ranked(m.lin(x).squeeze(0)),
    "squeeze of two": lambda m, x: ranked(torch.squeeze(m.lin(x), (0, 1))),
    "squeeze in place": squeezed_in_place,
}


@pytest.mark.parametrize("name", FLAT)
def test_a_size_decides_how_many_there_are(name: str) -> None:
    beside(Small(FLAT[name]), rows(8), [rows(n) for n in (8, 12, 2, 1, 5)])


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("first", [(4, 3), (1, 3)])
def test_a_size_decides_the_rank(name: str, first: tuple[int, int]) -> None:
    calls = [rows(*sizes) for sizes in ((4, 3), (1, 3), (4, 1), (1, 1), (2, 2))]
    assert beside(Small(DEEP[name]), rows(*first), calls) == RIGHT


PARTS: dict[str, Any] = {
    "the first": lambda h: h[:3],
    "the last": lambda h: h[-3:],
    "narrow": lambda h: h.narrow(0, 0, 1 if h.shape[0] == 1 else 2),
    "a part of a part": lambda h: h[1:][:2],
    "what is over": lambda h: h[4:],
}


@pytest.mark.parametrize("first", [8, 4, 3, 2])
@pytest.mark.parametrize("name", PARTS)
def test_a_size_decides_how_many_rows_there_are(name: str, first: int) -> None:
    model = Small(lambda m, x: PARTS[name](m.lin(x)) * (PARTS[name](m.lin(x)).shape[0] + 1))
    beside(model, rows(first), [rows(n) for n in (8, 1, 2, 3, 4, 5, 300)])


def test_what_is_broadcast_or_not_asks_nothing() -> None:
    def forward(m: Any, x: T) -> T:
        h = m.lin(x) + torch.ones(x.shape[0], 1)
        return torch.cat([h, h.reshape(-1, 8)]).view(2, -1, 8).transpose(0, 1) @ torch.ones(8, 8)

    opt = liger_fx.optimize(Small(forward), rows(4))
    assert not any("x_0" in guard for guard in opt.plans[0].guards.sizes)
    assert beside(Small(forward), rows(4), [rows(n) for n in (1, 7)]) == RIGHT


# -- arithmetic of sizes ---------------------------------------------------------------------------

ARITHMETIC: dict[str, Any] = {
    "a root by a power": lambda m, x: m.lin(x)[: int(x.shape[0] ** 0.5)],
    "math.sqrt": lambda m, x: m.lin(x) / math.sqrt(x.shape[0]),
    "math.isqrt": lambda m, x: m.lin(x)[: math.isqrt(x.shape[0])],
    "math.log": lambda m, x: m.lin(x) * math.log(x.shape[0] + 1),
    "a negative power": lambda m, x: m.lin(x) * x.shape[0] ** -0.5,
    "a branch on a root": lambda m, x: m.lin(x) * (2 if x.shape[0] ** 0.5 > 2.5 else 1),
    "float": lambda m, x: m.lin(x) * float(x.shape[0]),
}
EXACT: dict[str, Any] = {
    "the inverse": lambda m, x: m.lin(x) * (1 / x.shape[0]),
    "the inverse in a tensor": lambda m, x: m.lin(x) + torch.full((8,), 1 / x.shape[0]),
    "round": lambda m, x: m.lin(x)[: round(x.shape[0] / 3)],
    "round to digits": lambda m, x: m.lin(x) * round(x.shape[0] / 3, 1),
    "ceil": lambda m, x: m.lin(x)[: math.ceil(x.shape[0] / 3)],
    "floor": lambda m, x: m.lin(x)[: math.floor(x.shape[0] / 3)],
    "trunc": lambda m, x: m.lin(x)[: math.trunc(x.shape[0] / 3)],
    "divmod": lambda m, x: m.lin(x)[: divmod(x.shape[0], 3)[0]] * divmod(20, x.shape[0])[1],
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_that_no_guard_can_write_holds_for_the_size(name: str) -> None:
    beside(Small(ARITHMETIC[name]), rows(8), [rows(n) for n in (8, 12, 1, 5)])


@pytest.mark.parametrize("name", EXACT)
def test_arithmetic_of_sizes_is_recorded(name: str) -> None:
    assert beside(Small(EXACT[name]), rows(8), [rows(n) for n in (8, 12, 5, 2)]) == RIGHT


def test_rounded_sizes_are_nodes_that_can_be_saved() -> None:
    opt = liger_fx.optimize(Small(EXACT["round"]), rows(8))
    assert not any("x_0" in guard for guard in opt.plans[0].guards.sizes)
    names = [name_of(node.target) for node in opt.graph.nodes if node.op == "call_function"]
    assert "round" in names and None not in names


# -- results of opaque modules ---------------------------------------------------------------------


class Opaque(nn.Module):
    """Code that asks the data, and then ``makes`` something of a size of its own."""

    def __init__(self, makes: Callable[[T], Any]) -> None:
        super().__init__()
        self.makes = makes

    def forward(self, h: T) -> Any:
        return h * 0 if h.abs().max() > 1e6 else self.makes(h)


def mean_over(h: T) -> T:
    return h.sum(0) / h.shape[0]


OPAQUE: dict[str, tuple[Any, Any]] = {
    "half of it": (lambda h: h[::2], mean_over),
    "the first three": (lambda h: h[:3], mean_over),
    "padded": (lambda h: F.pad(h, (0, 0, 0, -h.shape[0] % 4)), mean_over),
    "repeated": (lambda h: h.repeat(2, 1), lambda h: h.view(h.shape[0], 2, 4).sum(1)),
    "wider": (lambda h: torch.cat([h] * h.shape[0], -1), lambda h: h.sum(-1) * h.shape[-1]),
    "two": (lambda h: (h[1:], h[:2]), lambda h: mean_over(h[0]) + mean_over(h[1])),
    "a number": (lambda h: (h, h.shape[0] // 2), lambda h: h[0] * h[1]),
    "in a dictionary": (lambda h: {"a": h[1:], "n": h.shape[0]}, lambda h: h["a"] * h["n"]),
    "another rank": (lambda h: h.squeeze(), ranked),
    "so many": (lambda h: list(h), lambda h: sum(i * row for i, row in enumerate(h))),
    "a float": (lambda h: (h, h.shape[0] / 2), lambda h: h[0] * h[1]),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_an_opaque_module_returns_is_read_from_it(name: str) -> None:
    makes, reads = OPAQUE[name]
    model = Small(lambda m, x: reads(m.opaque(m.lin(x))), opaque=Opaque(makes))
    beside(model, rows(4), [rows(n) for n in (4, 8, 2, 5)])


def test_sizes_of_an_opaque_result_are_no_examples_of_others() -> None:
    model = Small(lambda m, x: mean_over(m.opaque(m.lin(x))), opaque=Opaque(lambda h: h[::2]))
    assert beside(model, rows(8), [rows(n) for n in (16, 6)]) == RIGHT


def positive(h: T) -> T:
    keep = h.sum(-1) > 0
    keep[0] = True
    return h[keep]


@pytest.mark.parametrize(
    "reads",
    [
        lambda h, g: g * g.shape[0],
        lambda h, g: g[:3] * g[:3].shape[0],
        lambda h, g: (h + g.sum(0)) * (h + g.sum(0)).shape[0],
        lambda h, g: g * (2 if g.squeeze(0).dim() == 1 else 3),
    ],
)
@pytest.mark.parametrize("first", range(1, 9))
def test_sizes_that_the_data_decide_are_no_examples(reads: Any, first: int) -> None:
    def forward(m: Any, x: T) -> T:
        h = m.opaque(m.lin(x))
        result: T = reads(h, m.opaque(h))
        return result

    beside(Small(forward, opaque=Opaque(positive)), rows(first), [rows(n) for n in (1, 3, 6, 9)])


# -- what is asked of tensors ----------------------------------------------------------------------


def halves_its_gradient(m: Any, x: T) -> T:
    h = m.lin(x)
    if h.requires_grad:
        h.register_hook(lambda g: g * 0.5)
    return h * 1.0


def hooks_a_parameter(m: Any, x: T) -> T:
    handle = m.norm.weight.register_hook(lambda g: g * 0.5)
    result = m.norm(m.lin(x))
    m.handles.append(handle)
    return result


GRADIENTS: dict[str, Any] = {
    "a hook": halves_its_gradient,
    "a result": lambda m, x: m.lin(x) * (2 if m.lin(x).requires_grad else 1),
    "grad_fn": lambda m, x: m.lin(x) * (2 if m.lin(x).grad_fn is not None else 1),
    "is_leaf": lambda m, x: m.lin(x) * (2 if m.lin(x).is_leaf else 1),
    "an input": lambda m, x: m.lin(x) * (2 if x.requires_grad else 1),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_whether_gradients_are_recorded_is_not_guessed(name: str) -> None:
    given = rows(4)[0].requires_grad_()
    beside(Small(GRADIENTS[name]), rows(4), [rows(4), (given,)])
    beside(Small(GRADIENTS[name]), (given,), [rows(4), (given,)])


def test_a_hook_on_a_parameter_is_refused() -> None:
    model = Small(hooks_a_parameter)
    model.handles = []
    with pytest.raises(LigerFxError, match="register a hook"):
        liger_fx.optimize(model, rows(4))


LAYOUT: dict[str, Any] = {
    "stride": lambda m, x: m.lin(x) * x.stride(0),
    "all strides": lambda m, x: m.lin(x) * x.stride()[1],
    "contiguity": lambda m, x: m.lin(x) * (2 if x.is_contiguous() else 1),
    "contiguity of a view": lambda m, x: m.lin(x) * (2 if x.t().is_contiguous() else 1),
    "stride of a result": lambda m, x: m.lin(x) * (x * 2).stride(0),
    "offset": lambda m, x: m.lin(x) * (1 + x.storage_offset()),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_how_an_input_lies_in_memory(name: str) -> None:
    calls = [rows(4), (torch.randn(8, 4).t(),), (torch.randn(6, 8)[2:],)]
    beside(Small(LAYOUT[name]), rows(4), calls)


def freeze(m: Any) -> None:
    m.norm.weight.requires_grad_(False)


def exchange(tensor: T) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        m.table = nn.Parameter(tensor) if isinstance(m.table, nn.Parameter) else tensor.clone()

    return change


def with_table(forward: Any, kind: str) -> Small:
    model, table = Small(forward), torch.ones(2, 8)
    if kind == "buffer":
        model.register_buffer("table", table)
    else:
        model.table = nn.Parameter(table) if kind == "parameter" else table
    return model


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.lin(x) * (2 if m.norm.weight.requires_grad else 1),
        lambda m, x: m.lin(x) * (2 if any(p.requires_grad for p in m.norm.parameters()) else 1),
    ],
)
def test_a_parameter_that_is_frozen_later(forward: Any) -> None:
    assert beside(Small(forward), rows(4), change=freeze) == RIGHT


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
@pytest.mark.parametrize("asks", ["shape", "dtype"])
def test_a_tensor_of_the_model_that_is_exchanged(kind: str, asks: str) -> None:
    def forward(m: Any, x: T) -> T:
        factor = m.table.shape[0] if asks == "shape" else m.table.dtype.itemsize
        return m.lin(x) * factor + m.table.sum(0).float()

    new = torch.ones(3, 8) if asks == "shape" else torch.ones(2, 8).double()
    beside(with_table(forward, kind), rows(4), change=exchange(new))


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, tuple[Any, Any]] = {
    "default dtype": (
        lambda m, x: m.lin(x) * (2 if torch.get_default_dtype() is torch.float32 else 1),
        default_dtype,
    ),
    "inference mode": (
        lambda m, x: m.lin(x) * (2 if torch.is_inference_mode_enabled() else 1),
        torch.inference_mode,
    ),
    "deterministic mode": (
        lambda m, x: m.lin(x) * (2 if torch.are_deterministic_algorithms_enabled() else 1),
        deterministic,
    ),
    "anomaly mode": (
        lambda m, x: m.lin(x) * (2 if torch.is_anomaly_enabled() else 1),
        lambda: torch.autograd.set_detect_anomaly(True),
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_of_the_process_that_the_code_asks_for(name: str) -> None:
    forward, mode = MODES[name]
    model, (given,) = Small(forward), rows(4)
    opt = liger_fx.optimize(model, (given,))
    with mode():
        expected, found = model(given), opt(given)
    assert torch.equal(expected, found) and torch.equal(opt(given), model(given))


IDENTITY: dict[str, Any] = {
    "is": lambda m, x, y: m.lin(x) * (2 if x is y else 1),
    "is not": lambda m, x, y: m.lin(x) * (2 if y is not x else 1),
    "in a comprehension": lambda m, x, y: m.lin(x) * (1 + sum(one is x for one in [y, y])),
}


@pytest.mark.parametrize("name", IDENTITY)
@pytest.mark.parametrize("one_first", [True, False])
def test_one_tensor_given_twice(name: str, one_first: bool) -> None:
    def given(one: bool) -> tuple[T, T]:
        torch.manual_seed(3)
        x, y = torch.randn(4, 8), torch.randn(4, 8)
        return (x, x) if one else (x, y)

    model = Small(IDENTITY[name])
    opt = liger_fx.optimize(model, given(one_first))
    for one in (True, False, True):
        torch.testing.assert_close(opt(*given(one)), model(*given(one)))


# -- containers and constants ----------------------------------------------------------------------


class Text(str):
    """A string of another class."""


class Labelled(list[float]):
    """A list with an attribute."""

    def __init__(self, items: list[float], label: float) -> None:
        super().__init__(items)
        self.label = label


ARGUMENTS: dict[str, tuple[Any, list[Any]]] = {
    "a sign of zero": (lambda m, x, f: m.lin(x) * math.copysign(1, f), [0.0, -0.0]),
    "a sign inside": (lambda m, x, f: m.lin(x) * math.copysign(1, f[0]), [[0.0], [-0.0]]),
    "True and 1": (lambda m, x, f: m.lin(x) * (2 if f is True else 1), [1, True, 1.0]),
    "True and 1 inside": (lambda m, x, f: m.lin(x) * (2 if f[0] is True else 1), [(1,), (True,)]),
    "keys": (lambda m, x, f: m.lin(x) * (2 if any(map(_is_true, f)) else 1), [{1: 2}, {True: 2}]),
    "text": (lambda m, x, f: m.lin(x) * (2 if type(f) is str else 1), ["a", Text("a")]),
    "order": (lambda m, x, f: m.lin(x) * list(f.values())[0], [{"a": 2, "b": 3}, {"b": 3, "a": 2}]),
    "kinds of mappings": (
        lambda m, x, f: m.lin(x) * (2 if type(f) is dict else 1),
        [{"a": 2}, collections.OrderedDict(a=2), collections.defaultdict(int, a=2)],
    ),
    "attributes": (lambda m, x, f: m.lin(x) * f.label, [Labelled([1.0], 2.0), Labelled([1.0], 3)]),
}  # fmt: skip


def _is_true(key: Any) -> bool:
    return key is True


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_compare_equal_are_not_one(name: str) -> None:
    forward, values = ARGUMENTS[name]
    x = rows(4)[0]
    for first in values:
        beside(Small(forward), {"x": x, "f": first}, [{"x": x, "f": f} for f in values])


def flagged(m: Any, x: T, **options: Any) -> T:
    return -m.lin(x) if "flag" in options else m.lin(x) * (len(options) + 1)


def test_a_keyword_that_is_none_was_given() -> None:
    x = rows(4)[0]
    kinds: list[dict[str, Any]] = [
        {},
        {"flag": None},
        {"other": None},
        {"other": None, "more": None},
    ]
    calls = [{"x": x, **kind} for kind in kinds]
    for first in calls:
        assert beside(Small(flagged), first, calls) == RIGHT


@pytest.mark.parametrize("value", [1 + 2j, {1, 2}, b"ab"])
def test_what_no_graph_takes_is_refused_by_name(value: Any) -> None:
    with pytest.raises(LigerFxError, match=f"hold f, a {type(value).__name__}"):
        liger_fx.optimize(Small(lambda m, x, f: m.lin(x)), {"x": rows(4)[0], "f": value})


# -- masks -----------------------------------------------------------------------------------------

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2}
TEXT: dict[str, Any] = {
    "mpnet": lambda **k: MPNetModel(MPNetConfig(**BASE, **LAYERS, **k)),
    "squeezebert": lambda **k: SqueezeBertModel(
        SqueezeBertConfig(**BASE, **LAYERS, embedding_size=32, **k)
    ),
    "bert": lambda **k: BertModel(BertConfig(**BASE, **LAYERS, **k)),
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("first", ["ones", "padded", "none"])
def test_a_mask_of_ones_both_ways(name: str, first: str) -> None:
    ids = torch.randint(3, 60, (2, 7))
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[1, -3:] = 0
    calls: dict[str, dict[str, Any]] = {
        "ones": {"input_ids": ids, "attention_mask": ones},
        "padded": {"input_ids": ids, "attention_mask": padded},
        "none": {"input_ids": ids},
    }
    model = TEXT[name]().eval()
    assert beside(model, calls[first], list(calls.values()), grad=False) == RIGHT


def test_a_mask_of_ones_over_patches() -> None:
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_patches=16, patch_size=4, **LAYERS
    )
    call = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    assert beside(Siglip2VisionModel(config).eval(), call, grad=False) == RIGHT


# -- blocks inside ---------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, shapes: Callable[[T], T]) -> None:
        super().__init__()
        self.lin, self.shapes = nn.Linear(8, 8), shapes

    def forward(self, h: T) -> T:
        return self.shapes(self.lin(h))


def through_layers(m: Any, x: T) -> T:
    for layer in m.layers:
        x = layer(x)
    return ranked(x) * x.shape[0]


@pytest.mark.parametrize("shapes", [lambda h: h.squeeze(0), lambda h: h.squeeze()])
def test_the_rank_that_a_block_inside_returns(shapes: Any) -> None:
    layers = nn.ModuleList([Layer(shapes), Layer(shapes)])
    model = Small(through_layers, layers=layers)
    beside(model, rows(4, 3), [rows(*sizes) for sizes in ((1, 3), (4, 3), (1, 1))])
