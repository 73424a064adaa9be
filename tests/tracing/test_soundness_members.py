"""What hangs on modules, what they write to themselves, empty tensors, hooks: found by reading
hostilely."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import liger_fx
from liger_fx.errors import TraceError
from liger_fx.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Small(nn.Module):
    """Asks for what hangs on it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.n, self.own = nn.Linear(8, 8), nn.RMSNorm(8), Doubled()
        self.adapter: nn.Module | None = None
        self.more = nn.ModuleList([nn.Linear(8, 8)])
        self.register_buffer("shift", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.own(self.n(self.lin(x)))
        for layer in self.more:
            h = layer(h)
        h = h if self.adapter is None else self.adapter(h)
        return h if self.shift is None else h + self.shift


CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "a layer is appended": lambda m, new: m.more.append(new),
    "a layer is taken away": lambda m, new: m.more.__delitem__(0),
    "an adapter is put on": lambda m, new: setattr(m, "adapter", new),
    "a buffer is given": lambda m, new: setattr(m, "shift", new.bias.detach()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_hangs_on_a_module_may_change(change: str) -> None:
    model, new = Small(), nn.Linear(8, 8)
    opt, model = liger_fx.optimize(model, (X,)), copy.deepcopy(model)
    torch.testing.assert_close(opt(X), model(X))
    CHANGES[change](opt, new), CHANGES[change](model, new)
    torch.testing.assert_close(opt(X), model(X))


def test_the_code_of_a_class_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    opt = liger_fx.optimize(model, (X,))
    before = opt(X)
    monkeypatch.setattr(Doubled, "forward", lambda self, x: x * 3)
    torch.testing.assert_close(opt(X), model(X))
    assert not torch.equal(opt(X), before)


class AsksForRows(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return self.lin(x).sum() * 0 + 7
        return self.n(self.lin(x)).sum(0) / max(x.shape[0], 1)


def test_an_empty_tensor_is_another_kind_of_call() -> None:
    model = AsksForRows()
    opt = liger_fx.optimize(model, (X,))
    for rows in (4, 1, 0, 3):
        torch.testing.assert_close(opt(X[:rows]), model(X[:rows]))


class Signed(Small):
    def forward(self, x: torch.Tensor, k: float) -> torch.Tensor:
        return self.n(self.lin(x)) * math.copysign(1, k)


def test_numbers_that_take_turns() -> None:
    model = Signed()
    opt = liger_fx.optimize(model, (X, 0.0))
    for k in (0.0, -0.0, 0.0, -0.0, 2.0, -2.0, 2.0):
        torch.testing.assert_close(opt(X, k), model(X, k))


class Normed(Small):
    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8, momentum=momentum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.n(self.bn(self.lin(x)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_trace_counts_no_batch(momentum: float | None) -> None:
    model = Normed(momentum)
    reference = copy.deepcopy(model)
    opt = liger_fx.optimize(model, (X,))
    assert model.bn.num_batches_tracked is not None and not model.bn.num_batches_tracked
    torch.testing.assert_close(opt(X), reference(X))
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Router(nn.Module):
    def __init__(self, aux: Any) -> None:
        super().__init__()
        self.gate, self.aux = nn.Linear(8, 3), aux

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.gate(x).softmax(-1)
        self.aux = shares.mean(0).square().sum()
        return x * len(shares.argmax(-1).unique().tolist())


@pytest.mark.parametrize("aux", [None, 0.0, torch.tensor(3.0)], ids=["none", "zero", "an old one"])
def test_what_an_opaque_module_writes_is_not_read_from_the_trace(aux: Any) -> None:
    class Routed(Small):
        def forward(self, x: torch.Tensor) -> Any:
            return self.router(self.n(self.lin(x))), self.router.aux

    model = Routed()
    model.router = Router(aux)
    with pytest.raises(TraceError, match="aux of a Router"):
        liger_fx.optimize(model, (X,))


class TakesForces(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda t: self.n(self.lin(t)).square().sum())(x)


def test_a_transform_inside_a_model_is_refused() -> None:
    with pytest.raises(TraceError, match=r"torch\.func"):
        liger_fx.optimize(TakesForces(), (X,))


def test_modules_that_hang_in_a_list_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.norm = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.LayerNorm(8)
            self.steps = nn.ModuleList([self.mlp, self.norm, self.mlp, self.norm])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for step in self.steps:
                x = step(x)
            return x

    model = Shared()
    torch.testing.assert_close(liger_fx.optimize(model, (X,))(X), model(X))


def test_a_hook_that_would_never_run_is_refused() -> None:
    opt = liger_fx.optimize(tiny_model("llama", layers=1))
    activation = opt.get_submodule("model.layers.0.mlp.act_fn")
    with pytest.raises(RuntimeError, match="never run"):
        activation.register_forward_hook(print)


def test_a_copy_of_a_wrapper_is_a_wrapper() -> None:
    peft = pytest.importorskip("peft")
    opt = liger_fx.optimize(tiny_model("llama", layers=1))
    wrapped = peft.get_peft_model(opt, peft.LoraConfig(target_modules=["q_proj"]))
    copied = copy.deepcopy(wrapped)
    assert type(copied) is type(wrapped)
    assert copied.state_dict().keys() == wrapped.state_dict().keys()


@pytest.mark.parametrize("router_logits", [None, False, True])
def test_a_checkpoint_computes_a_layer_again_as_it_did(router_logits: bool | None) -> None:
    """Qwen 3, and Mixtral without its routers' logits and with them."""
    ids = torch.randint(3, 90, (2, 9))
    if router_logits is not None:
        config = MixtralConfig(
            hidden_size=32, intermediate_size=64, vocab_size=97, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            output_router_logits=router_logits,
        )  # fmt: skip
        model: Any = MixtralForCausalLM(config)
    else:
        model = tiny_model("qwen3", layers=2)
    opt = liger_fx.optimize(model)
    gradients = []
    for one in (model, opt):
        one.train().zero_grad()
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
