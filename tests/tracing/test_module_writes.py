"""A forward that changes modules for the time of a call: as the original; nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::liger_fx.errors.FallbackWarning")
IDS = torch.arange(3, 15).view(2, 6)
ATTENTION = "model.layers.1.self_attn"


@contextmanager
def attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    was = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, was)


@contextmanager
def hooked(register: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    yield
    handle.remove()  # nothing sees to it if the call fails


def forward_hook(path: str) -> Any:
    def double(_: Any, args: Any, out: Any) -> Any:
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    return lambda m: hooked(m.base.get_submodule(path).register_forward_hook, double)


def pre_hook(path: str) -> Any:
    def double(_: Any, args: Any) -> Any:
        return args[0] * 2, *args[1:]

    return lambda m: hooked(m.base.get_submodule(path).register_forward_pre_hook, double)


@contextmanager
def patched(module: Any) -> Iterator[None]:
    was = module.forward
    module.forward = lambda *args, **kwargs: was(*args, **kwargs) * 2
    try:
        yield
    finally:
        del module.forward


@contextmanager
def in_train_mode(m: Any) -> Iterator[None]:
    m.base.train()
    yield
    m.base.eval()


@contextmanager
def one_layer_less(m: Any) -> Iterator[None]:
    with (
        attribute(m.base.model, "layers", m.base.model.layers[:1]),
        attribute(m.base.config, "num_hidden_layers", 1),
    ):
        yield


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on the base": lambda m: hooked(
        m.base.model.register_forward_hook,
        lambda _, args, out: setattr(out, "last_hidden_state", out.last_hidden_state * 2),
    ),
    "a hook on a layer": forward_hook("model.layers.0"),
    "a hook on attention": forward_hook(ATTENTION),
    "a hook on a linear layer": forward_hook(f"{ATTENTION}.q_proj"),
    "a hook on an mlp": forward_hook("model.layers.0.mlp"),
    "a hook on the head": forward_hook("lm_head"),
    "a pre-hook on a norm": pre_hook("model.layers.0.post_attention_layernorm"),
    "a pre-hook on the head": pre_hook("lm_head"),
    "another head": lambda m: attribute(m.base, "lm_head", m.spare),
    "another number": lambda m: attribute(m.base.get_submodule(ATTENTION), "scaling", 2.0),
    "another forward": lambda m: patched(m.base.get_submodule(ATTENTION).q_proj),
    "another mode": in_train_mode,
    "a layer less": one_layer_less,
}


class Changes(nn.Module):
    """Calls a language model, changed for the time of the call if it is asked to."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.base = tiny_model("llama")
        self.spare = nn.Linear(self.base.config.hidden_size, self.base.config.vocab_size)
        self.change = change

    def forward(self, ids: torch.Tensor, change: bool = True) -> torch.Tensor:
        if not change:
            return self.base(ids, use_cache=False).logits  # type: ignore[no-any-return]
        with CHANGES[self.change](self):
            return self.base(ids, use_cache=False).logits  # type: ignore[no-any-return]


def step(m: nn.Module, change: bool) -> list[torch.Tensor]:
    m.zero_grad()
    result = m(IDS, change=change)
    result.square().mean().backward()
    return [result.detach(), *(p.grad for p in m.parameters() if p.grad is not None)]


@pytest.mark.parametrize("first", [True, False], ids=["changes first", "changes later"])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_heeded(change: str, first: bool) -> None:
    torch.manual_seed(0)
    model = Changes(change).eval()
    twin = copy.deepcopy(model)
    opt = liger_fx.optimize(model, inputs={"ids": IDS, "change": first})
    for changed in (first, not first, first):
        torch.testing.assert_close(step(opt, changed), step(twin, changed), rtol=1e-4, atol=1e-6)
    plain = step(twin, False)
    assert not torch.equal(plain[0], step(twin, True)[0]) or change == "another mode"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    for m in (model, opt):
        found = [one for one in m.modules() if one.training or "forward" in vars(one)]
        assert not found and len(m.base.model.layers) == len(twin.base.model.layers)
    torch.testing.assert_close(step(model, False), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("named", [True, False], ids=["named", "a lambda"])
def test_a_function_of_a_modelling_file_may_be_exchanged(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    was = modeling_llama.eager_attention_forward

    def half(*args: Any, **kwargs: Any) -> Any:
        out, weights = was(*args, **kwargs)
        return out / 2, weights

    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    opt = liger_fx.optimize(model)
    for function in (half if named else lambda *a, **k: half(*a, **k), was):
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", function)
        torch.testing.assert_close(opt(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


class Counts(nn.Module):
    """Cannot be traced as a whole, and leaves traces of each call everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.base = tiny_model("llama").train()
        self.calls, self.seen = 0, list[int]()
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("count", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(len(ids))
        self.count += 1
        self.scale.data.mul_(2.0)
        noise = torch.rand(()) + torch.rand((), generator=self.generator)
        found = self.base(ids, use_cache=False).logits + noise * self.scale
        return found if found.sum() > 0 else -found

    def state(self) -> Any:
        tensors = [self.generator.get_state(), *copy.deepcopy(self.state_dict()).values()]
        return self.calls, list(self.seen), tensors


def test_the_call_that_optimize_makes_leaves_nothing() -> None:
    model = Counts()
    states, before = torch.get_rng_state(), model.state()
    opt = liger_fx.optimize(model, inputs={"ids": IDS})
    assert torch.equal(torch.get_rng_state(), states)
    for found in (model.state(), opt.state()):
        torch.testing.assert_close(found, before, rtol=0, atol=0)
    assert opt.report is not None and len(opt.report.rewritten) > 4
    twin = copy.deepcopy(model)
    results = []
    for m in (twin, opt):
        torch.manual_seed(1)
        results.append(m(IDS))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Swaps(nn.Module):
    """Another activation in the module inside, for the time of a call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        was, self.inner.act_fn = self.inner.act_fn, nn.ReLU()
        try:
            return self.inner(*args)  # type: ignore[no-any-return]
        finally:
            self.inner.act_fn = was


class Hooks(nn.Module):
    """Puts a hook on another module, once and for good."""

    def __init__(self, inner: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.inner, self.__dict__["other"] = inner, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.other._forward_hooks:
            self.other.register_forward_hook(lambda module, args, out: out * 1.5)
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("arch, path", [("llama", "mlp"), ("mixtral", "mlp.experts")])
def test_an_activation_swapped_inside(arch: str, path: str, later: bool) -> None:
    """Where a named module stands for what is swapped in, which turns back into that."""
    model = tiny_model(arch)
    opt = liger_fx.optimize(copy.deepcopy(model)) if later else model
    for m in {id(m): m for m in (model, opt)}.values():
        layer = m.model.layers[1]
        swaps = Swaps(layer.get_submodule(path))
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, swaps)
    opt = opt if later else liger_fx.optimize(copy.deepcopy(model))
    for training in (False, True, False):
        wanted, found = (m.train(training)(IDS, labels=IDS) for m in (model, opt))
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)


def test_a_hook_that_stays() -> None:
    model = tiny_model("llama")
    opt = liger_fx.optimize(copy.deepcopy(model))
    for m in (model, opt):
        layer = m.model.layers[1]
        layer.mlp = Hooks(layer.mlp, layer.input_layernorm)
    for _ in range(3):
        torch.testing.assert_close(opt(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert len(opt.model.layers[1].input_layernorm._forward_hooks) == 1
