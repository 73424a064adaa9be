"""What is changed between two calls: attributes of modules, globals, functions, modules, sizes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import liger_fx
from liger_fx.errors import FallbackWarning, TraceError
from liger_fx.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


PATHS = (
    "model.layers.1.self_attn", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp",
    "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm",
    "model.rotary_emb", "lm_head",
)  # fmt: skip


def halved(result: Any) -> Any:
    first, *rest = result if isinstance(result, tuple) else (result,)
    return (first / 2, *rest) if isinstance(result, tuple) else first / 2


def by_instance(module: Any) -> None:
    was = module.forward
    module.forward = lambda *args, **kwargs: halved(was(*args, **kwargs))


def by_class(module: Any) -> None:
    kind = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return halved(kind.forward(self, *args, **kwargs))

    module.__class__ = type(f"Half{kind.__name__}", (kind,), {"forward": forward})


@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("change", [by_instance, by_class])
@pytest.mark.parametrize("path", PATHS)
def test_a_forward_of_its_own_is_heeded(path: str, change: Any, called: bool) -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 15).view(2, 6)
    opt = liger_fx.optimize(copy.deepcopy(model))
    before = model(ids, labels=ids)
    for m in (model, opt):
        if called:
            m(ids, labels=ids)
        change(m.get_submodule(path))
    wanted, found = (m(ids, labels=ids) for m in (model, opt))
    assert not torch.allclose(wanted.loss, before.loss)
    torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits))


def by_halves(original: Any) -> Any:
    return lambda *args, **kwargs: halved(original(*args, **kwargs))


@pytest.mark.parametrize("path", ["model.norm", "model.layers.1.mlp", "model.layers.1.mlp.act_fn"])
def test_the_class_of_what_was_replaced_may_change(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 15).view(2, 6)
    opt = liger_fx.optimize(copy.deepcopy(model))
    before, kind = model(ids), type(model.get_submodule(path))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", by_halves(kind.forward))
        wanted = model(ids, labels=ids)
        assert not torch.allclose(wanted.logits, before.logits)
        for _ in range(2):
            found = opt(ids, labels=ids)
            torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits))
    torch.testing.assert_close(opt(ids).logits, before.logits)
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= {type(m).__name__ for m in opt.modules()}


class OtherNorm(LlamaRMSNorm):
    """Inherits its forward, at first."""


def test_a_class_of_what_was_replaced_gets_a_forward_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    model.model.norm.__class__ = OtherNorm
    ids = torch.arange(3, 15).view(2, 6)
    opt = liger_fx.optimize(copy.deepcopy(model))
    before = model(ids).logits
    forward = by_halves(LlamaRMSNorm.forward)
    monkeypatch.setattr(OtherNorm, "forward", forward, raising=False)
    assert not torch.allclose(model(ids).logits, before)
    torch.testing.assert_close(opt(ids).logits, model(ids).logits)


def doubled_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.chunk(2, dim=-1)[0] * 2


@pytest.mark.parametrize("on", ["class", "instance"])
def test_a_method_of_what_was_replaced_may_change(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("grouped_mm")
    ids = torch.arange(3, 15).view(2, 6)
    opt = liger_fx.optimize(copy.deepcopy(model))
    before = model(ids).logits
    kind = type(model.model.layers[0].mlp.experts)
    if on == "class":
        monkeypatch.setattr(kind, "_apply_gate", doubled_gate)
    else:
        for m in (model, opt):
            experts = m.model.layers[0].mlp.experts
            experts._apply_gate = types.MethodType(doubled_gate, experts)
    assert not torch.allclose(model(ids).logits, before)
    torch.testing.assert_close(opt(ids).logits, model(ids).logits)


def test_what_a_named_module_computes_refuses_changes() -> None:
    opt = liger_fx.optimize(tiny_model("llama"))
    activation = opt.model.layers[0].mlp.act_fn
    with pytest.raises(RuntimeError, match="forward set on it would be lost"):
        activation.forward = torch.relu
    activation.eval()


def test_attention_weights_after_another_implementation() -> None:
    model = tiny_model("llama")
    opt = liger_fx.optimize(copy.deepcopy(model))
    ids = torch.arange(3, 15).view(2, 6)
    for implementation in ("sdpa", "eager", "sdpa"):
        for m in (model, opt):
            m.set_attn_implementation(implementation)
        with torch.no_grad():
            wanted, found = (m(ids, output_attentions=True).attentions for m in (model, opt))
        torch.testing.assert_close(found, wanted)


@dataclasses.dataclass
class Settings:
    scale: float = 1.0


class Scaled(nn.Module):
    """Reads attributes of every kind."""

    shared = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n = nn.Linear(8, 8), nn.RMSNorm(8)
        self.scaling, self.flag = 0.5, False
        self.steps, self.table, self.seen = [1.0, 2.0], {"a": {"b": 1.0}}, {1}
        self.settings, self.space = Settings(), types.SimpleNamespace(k=2.0)
        self.mix = functools.partial(torch.mul, other=2.0)

    def bent(self, h: torch.Tensor) -> torch.Tensor:
        return h * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bent(self.lin(self.n(x))) * self.scaling * self.shared
        h = h + 1 if self.flag else h
        h = h * self.steps[0] * self.table["a"]["b"] * len(self.seen)
        h = h * getattr(self, "late", 1.0)
        return x + self.mix(h * self.settings.scale * self.space.k)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda m: setattr(m, "scaling", 0.1),
    "of another type": lambda m: setattr(m, "scaling", torch.tensor(0.25)),
    "a flag": lambda m: setattr(m, "flag", True),
    "an item of a list": lambda m: m.steps.__setitem__(0, 3.0),
    "another list": lambda m: setattr(m, "steps", [9.0]),
    "inside a dict": lambda m: m.table["a"].update(b=5.0),
    "a set": lambda m: m.seen.add(4),
    "a dataclass": lambda m: setattr(m.settings, "scale", 4.0),
    "a namespace": lambda m: setattr(m.space, "k", 7.0),
    "keywords of a partial": lambda m: m.mix.keywords.update(other=9.0),
    "another partial": lambda m: setattr(m, "mix", functools.partial(torch.add, other=2.0)),
    "one that was not there": lambda m: setattr(m, "late", 3.0),
    "one before the class's": lambda m: setattr(m, "shared", 4.0),
    "a method": lambda m: setattr(m, "bent", torch.neg),
    "through __dict__": lambda m: vars(m).update(scaling=0.3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["the model", "a layer", "all layers", "a flat graph"])
def test_an_attribute_that_is_changed_later(change: str, where: str) -> None:
    model: nn.Module = Scaled() if where == "the model" else Stack()
    opt = liger_fx.optimize(model, (X,), **({"blocks": ()} if where == "a flat graph" else {}))
    model = copy.deepcopy(model)
    torch.testing.assert_close(opt(X), model(X))
    before = opt(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for tree in (opt, model):
            layers: Any = getattr(tree, "layers", [tree])
            for layer in layers if where == "all layers" else layers[-1:]:
                CHANGES[change](layer)
        for _ in range(2):
            torch.testing.assert_close(opt(X), model(X))
    assert not torch.equal(opt(X), before)


def test_an_attribute_that_is_set_back_costs_no_trace() -> None:
    model = Stack()
    opt = liger_fx.optimize(model, (X,))
    expected = opt(X)
    layer: Any = opt.get_submodule("layers.1")
    plans = set()
    for scaling in (0.5, 0.25, 0.5, float("0.25"), 0.5, 1 / 2):
        layer.scaling = scaling
        assert torch.equal(opt(X), expected) is (scaling == 0.5)
        plans.add(len(layer._block.alike.plans))
    assert max(plans) == 2


class AsksForAbsentOnes(nn.Module):
    """Asks for a parameter, a buffer and a child that are None, and for an attribute that is not
    there."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n = nn.Linear(8, 8, bias=False), nn.RMSNorm(8)
        self.register_buffer("mask", None)
        self.register_module("gate", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.linear(self.n(x), self.lin.weight, self.lin.bias)
        h = h if self.mask is None else h * self.mask
        h = h if self.gate is None else self.gate(h)
        late = getattr(self, "late", None)
        return h if late is None else h + late


@pytest.mark.parametrize("place", ["lin.bias", "mask", "gate", "late"])
def test_what_was_absent_is_set_later(place: str) -> None:
    model = AsksForAbsentOnes()
    opt = liger_fx.optimize(model, (X,))
    torch.testing.assert_close(opt(X), model(X))
    assert len(opt.plans) == 1
    owner, _, name = place.rpartition(".")
    value = nn.Tanh() if name == "gate" else torch.full((8,), 2.0)
    for tree in (opt, model):
        new = value if name in ("gate", "mask") else nn.Parameter(value.clone())
        setattr(tree.get_submodule(owner), name, new)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        torch.testing.assert_close(opt(X), model(X))


def test_a_plan_of_another_day_is_not_saved_and_not_copied(tmp_path: Any) -> None:
    model = tiny_model("llama", layers=1)
    opt = liger_fx.optimize(model)
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        opt(input_ids=ids, use_cache=False)
        opt.get_submodule("model.layers.0.self_attn").scaling = 0.1  # type: ignore[assignment]
        expected = opt(input_ids=ids, use_cache=False).logits
        for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            torch.testing.assert_close(other(input_ids=ids, use_cache=False).logits, expected)
            assert other.get_submodule("model.layers.0").code.count("0.1") == 1
        liger_fx.save(opt, tmp_path / "saved", weights=False)
        loaded = liger_fx.load(tmp_path / "saved", model=liger_fx.restore(opt))
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)


FACTOR, TABLE = 2.0, {"k": 2.0}


def helper(x: torch.Tensor, times: float = 3.0) -> torch.Tensor:
    return x * times


def other_helper(x: torch.Tensor, times: float = 3.0) -> torch.Tensor:
    return x - times


class ReadsOutside(nn.Module):
    KIND = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(self.lin(self.n(x)) * FACTOR) * TABLE["k"] * self.KIND


OUTSIDE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a global": lambda p: p.setitem(globals(), "FACTOR", 5.0),
    "inside a global": lambda p: p.setitem(TABLE, "k", 5.0),
    "another function": lambda p: p.setitem(globals(), "helper", other_helper),
    "the code of a function": lambda p: p.setattr(helper, "__code__", other_helper.__code__),
    "the defaults of a function": lambda p: p.setattr(helper, "__defaults__", (7.0,)),
    "an attribute of a class": lambda p: p.setattr(ReadsOutside, "KIND", 7.0),
}


@pytest.mark.parametrize("change", OUTSIDE)
def test_what_is_outside_the_modules_changes(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ReadsOutside()
    opt = liger_fx.optimize(model, (X,))
    before = opt(X)
    OUTSIDE[change](monkeypatch)
    torch.testing.assert_close(opt(X), model(X))
    assert not torch.equal(opt(X), before)
    monkeypatch.undo()
    torch.testing.assert_close(opt(X), before)


def test_a_closure_changes() -> None:
    factor = 2.0

    class Closed(ReadsOutside):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(self.n(x)) * factor

    model = Closed()
    opt = liger_fx.optimize(model, (X,))
    before = opt(X)
    factor = 5.0
    torch.testing.assert_close(opt(X), model(X))
    assert not torch.equal(opt(X), before)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


def _halved(linear: nn.Module) -> nn.Module:
    return nn.Sequential(linear, Half())


SWAPS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "a norm by nothing": ("model.layers.0.input_layernorm", lambda m: nn.Identity()),
    "a norm by another": ("model.layers.0.input_layernorm", lambda m: nn.LayerNorm(64)),
    "the norm of a sum": ("model.layers.1.post_attention_layernorm", lambda m: Half()),
    "the last norm": ("model.norm", lambda m: nn.Identity()),
    "an MLP": ("model.layers.1.mlp", lambda m: Half()),
    "an activation inside": ("model.layers.1.mlp.act_fn", lambda m: nn.ReLU()),
    "a linear inside": ("model.layers.1.mlp.gate_proj", _halved),
    "a linear": ("model.layers.0.self_attn.q_proj", _halved),
    "the head": ("lm_head", _halved),
}


@pytest.mark.parametrize("blocks", [None, ()], ids=["blocks", "flat"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_module_is_exchanged_for_another(swap: str, blocks: Any) -> None:
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model, blocks=blocks)
    model, ids = copy.deepcopy(model), torch.randint(3, 90, (2, 7))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        before = opt(input_ids=ids, use_cache=False).logits
        path, make = SWAPS[swap]
        owner, _, name = path.rpartition(".")
        for tree in (opt, model):
            torch.manual_seed(0)
            holder: Any = tree.get_submodule(owner)
            setattr(holder, name, make(getattr(holder, name)))
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(opt(input_ids=ids, use_cache=False).logits, expected)
        assert not torch.equal(opt(input_ids=ids, use_cache=False).logits, before)


def test_an_option_of_what_a_named_module_replaced_is_set() -> None:
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model)
    model, ids = copy.deepcopy(model), torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        before = opt(input_ids=ids, use_cache=False).logits
        for tree in (opt, model):
            norm: Any = tree.get_submodule("model.layers.1.input_layernorm")
            norm.variance_epsilon = 3.0
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(opt(input_ids=ids, use_cache=False).logits, expected)
        assert not torch.equal(expected, before)
    assert type(opt.get_submodule("model.layers.1.input_layernorm")).__name__ == "LigerRMSNorm"


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(self.n(x))
        h = h * 2 if x.shape[0] > 5 else h
        return h + 1 if x.shape[0] > 12 else h


class GrowsInside(Grows):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Grows() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lin(x)


class InPieces(Grows):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = self.lin(self.n(x)).split(4)
        return torch.cat([piece * (i + 1) for i, piece in enumerate(pieces)])


class InPiecesInside(GrowsInside):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InPieces() for _ in range(2))


@pytest.mark.parametrize("make", [Grows, GrowsInside, InPieces, InPiecesInside])
def test_other_sizes_get_a_graph_of_their_own(make: type[nn.Module]) -> None:
    model = make()
    opt = liger_fx.optimize(model, (X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for rows in (4, 6, 13, 3, 20, 7, 1):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(opt(x), model(x))
    plans = len(opt._block.alike.plans)
    opt(torch.randn(6, 8)), opt(torch.randn(13, 8))
    assert len(opt._block.alike.plans) == plans <= 7


def test_the_limit_of_graphs_is_told() -> None:
    model = InPieces()
    opt = liger_fx.optimize(model, (X,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for pieces in range(1, 20):
            x = torch.randn(4 * pieces, 8)
            torch.testing.assert_close(opt(x), model(x))
    told = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert len(told) == 1 and "more than 16 ways" in told[0]


class ReadsTensors(nn.Module):
    """Asks of its tensors what a trace answers for them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(8, 8), nn.Linear(8, 8), nn.RMSNorm(8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("rows", torch.ones(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.b(self.a(self.n(x))) @ self.w
        h = h * (2 if self.a.weight is self.b.weight else 3)
        h = h + (1 if self.w.t().is_contiguous() else 0) + self.rows.storage_offset()
        h = h * (5 if type(self.w) is nn.Parameter else 7)
        return h / self.rows.t().shape[1]


class OfItsOwn(nn.Parameter):
    pass


TENSORS: dict[str, Callable[[Any], object]] = {
    "two are tied": lambda m: setattr(m.b, "weight", m.a.weight),
    "strides by .data": lambda m: setattr(m.w, "data", m.w.data.t().contiguous().t()),
    "strides by set_": lambda m: torch.no_grad()(m.w.set_)(torch.arange(64.0).view(8, 8).t()),
    "an offset": lambda m: setattr(m, "rows", torch.ones(4, 8)[1:]),
    "a shape": lambda m: setattr(m, "rows", torch.ones(5, 8)),
    "a class": lambda m: setattr(m, "w", OfItsOwn(m.w.detach())),
    "values by .data": lambda m: setattr(m.w, "data", torch.ones(8, 8)),
}


@pytest.mark.parametrize("change", TENSORS)
def test_a_tensor_of_the_model_is_another(change: str) -> None:
    model = ReadsTensors()
    opt = liger_fx.optimize(copy.deepcopy(model), (X,))
    before = opt(X)
    torch.testing.assert_close(before, model(X))
    for tree in (opt, model):
        TENSORS[change](tree)
    torch.testing.assert_close(opt(X), model(X))
    assert not torch.equal(opt(X), before)


def test_a_head_that_is_tied_later_gets_both_gradients() -> None:
    model = tiny_model("llama", layers=1)
    opt = liger_fx.optimize(copy.deepcopy(model))
    ids = torch.randint(3, 90, (2, 7))
    assert opt.lm_head.weight is not opt.model.embed_tokens.weight
    opt(input_ids=ids, labels=ids)
    for tree in (opt, model):
        tree.lm_head.weight = tree.model.embed_tokens.weight
        tree.zero_grad()
        tree(input_ids=ids, labels=ids).loss.backward()
    ours, theirs = opt.model.embed_tokens.weight.grad, model.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": torch.nn.modules.module.register_module_forward_hook,
    "forward pre": torch.nn.modules.module.register_module_forward_pre_hook,
    "full backward": torch.nn.modules.module.register_module_full_backward_hook,
    "full backward pre": torch.nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_all_modules_that_is_put_on_later(kind: str) -> None:
    model = Stack()
    opt = liger_fx.optimize(copy.deepcopy(model), (X,))
    opt(X)
    seen: list[str] = []
    handle = HOOKS[kind](lambda module, *_: seen.append(type(module).__name__.strip("_")))
    try:
        with pytest.warns(FallbackWarning, match="a hook stands on all modules"):
            opt(X).sum().backward()
        ours, seen[:] = list(seen), []
        model(X).sum().backward()
    finally:
        handle.remove()
    assert len(ours) == len(seen) and {"Linear", "Scaled", "Stack"} <= set(ours)
    torch.testing.assert_close(opt(X), model(X))


class Layer(nn.Module):
    """A layer that can be followed; ``op`` is what its subclasses are about."""

    op: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.op(self.lin(self.n(x)))


class CountsTokens(nn.Module):
    """Opaque: it depends on the data. Keeps what others read."""

    kept: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.kept, self.space = 0.0, [], types.SimpleNamespace(last=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aux = float(x.detach().mean())
        self.kept.append(x.detach().mean())
        self.space.last = self.aux * 2
        _LOSSES.append(self.aux)
        return x * len(x.argmax(-1).unique().tolist())


_LOSSES: list[float] = []


class Counting(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.op = CountsTokens()


class LinearThatKeeps(nn.Linear):
    last: Any = torch.zeros(())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result = super().forward(input)
        self.last = result.detach().mean()
        return result


class Keeping(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.op = LinearThatKeeps(8, 8)


def _keep(module: Any, args: Any, result: torch.Tensor) -> None:
    module.last = result.detach().mean()


class Hooked(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.op = nn.Linear(8, 8)
        self.op.last = torch.zeros(())
        self.op.register_forward_hook(_keep)


class Reading(nn.Module):
    """Reads, after its layers ran, what they keep."""

    layer: type[nn.Module] = Counting

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(self.layer() for _ in range(2)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x), self.kept()

    def kept(self) -> Any:
        return [layer.op.aux for layer in self.layers]  # type: ignore[union-attr]


class ReadsList(Reading):
    def kept(self) -> Any:
        found = [layer.op.kept[-1] for layer in self.layers]  # type: ignore[union-attr,index]
        return torch.stack(found)


class ReadsInside(Reading):
    def kept(self) -> Any:
        return [layer.op.space.last for layer in self.layers]  # type: ignore[union-attr]


class ReadsByDict(Reading):
    def kept(self) -> Any:
        return [vars(layer.op)["aux"] for layer in self.layers]


class ReadsGlobal(Reading):
    def kept(self) -> Any:
        return list(_LOSSES[-2:])


class ReadsSharedList(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[torch.Tensor] = []
        for layer in self.layers:
            layer.op.kept = self.all  # type: ignore[union-attr]

    def kept(self) -> Any:
        return torch.stack(self.all[-2:])


class ReadsLast(Reading):
    layer = Keeping

    def kept(self) -> Any:
        return [layer.op.last for layer in self.layers]  # type: ignore[union-attr]


class ReadsHooked(ReadsLast):
    layer = Hooked


READERS = [Reading, ReadsList, ReadsInside, ReadsByDict, ReadsGlobal, ReadsSharedList, ReadsLast,
           ReadsHooked]  # fmt: skip


@pytest.mark.parametrize("make", READERS)
@pytest.mark.parametrize("ran_before", [False, True])
def test_what_a_block_keeps_is_read_after_it_ran(make: type[nn.Module], ran_before: bool) -> None:
    model = make()
    if ran_before:
        model(X + 1)
    opt = liger_fx.optimize(copy.deepcopy(model), (X,))
    for rows in (4, 6, 4):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(opt(x), model(x))
    layer: Any = opt.get_submodule("layers.0")
    assert layer.plans  # the layers run their graphs all the same


class Adding(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.around: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (around,) = self.around
        around.total = around.total + self.lin(self.n(x)).detach().mean()
        return x


class Totals(Reading):
    layer = Adding

    def __init__(self) -> None:
        super().__init__()
        self.total: Any = 0.0
        for layer in self.layers:
            layer.around = [self]  # type: ignore[assignment]

    def kept(self) -> Any:
        return self.total


def test_what_a_block_writes_to_the_model_around_it_is_refused() -> None:
    with pytest.raises(TraceError, match="total of a Totals"):
        liger_fx.optimize(Totals(), (X,))


class LooksAside(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.other = 2.0, [self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lin(self.n(x)) * self.other[0].factor


class Aside(Reading):
    layer = LooksAside

    def __init__(self) -> None:
        super().__init__()
        first, second = self.layers
        second.other = [first]  # type: ignore[assignment]

    def kept(self) -> Any:
        return self.layers[1].factor


def test_an_attribute_of_a_module_elsewhere_is_read_at_each_call() -> None:
    model = Aside()
    opt = liger_fx.optimize(copy.deepcopy(model), (X,))
    for factor in (2.0, 5.0, 7.0):
        for tree in (opt, model):
            for layer in tree.layers:
                layer.factor = factor
        torch.testing.assert_close(opt(X), model(X))


class TwoKinds(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.both = False

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.lin(self.n(x))
        return (h, h.mean(-1, keepdim=True)) if self.both else h


class TakesBoth(Reading):
    layer = TwoKinds

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
            x = x[0] + x[1] if isinstance(x, tuple) else x
        return self.head(x)


def test_what_a_block_returns_may_change_with_an_attribute() -> None:
    model = TakesBoth()
    opt = liger_fx.optimize(copy.deepcopy(model), (X,))
    for both in (False, True, False, True):
        for tree in (opt, model):
            for layer in tree.layers:
                layer.both = both
        torch.testing.assert_close(opt(X), model(X))


@pytest.mark.parametrize("change", ["a number", "a flag"])
def test_an_attribute_that_is_changed_after_it_was_compiled(change: str) -> None:
    model = Stack()
    opt = liger_fx.optimize(copy.deepcopy(model), (X,))
    torch._dynamo.reset()
    compiled = torch.compile(opt, backend="eager", fullgraph=True)
    before = compiled(X)
    torch.testing.assert_close(before, model(X))
    for tree in (opt, model):
        for layer in tree.layers:
            CHANGES[change](layer)
    torch.testing.assert_close(compiled(X), model(X))
    assert not torch.equal(compiled(X), before)
