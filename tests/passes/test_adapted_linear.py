"""PEFT's LoRA layers become LigerLoraLinear, and stay PEFT's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.tiny import tiny_model

peft = pytest.importorskip("peft")

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny Llama with an adapter on each linear layer but the head, its B drawn."""
    torch.manual_seed(0)
    model = tiny_model("llama", 2).to(dtype)
    config = {"r": 4, "target_modules": "all-linear", **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def optimized(wrapped: Any) -> Any:
    """The PEFT model around an optimised copy of its model."""
    ours = copy.deepcopy(wrapped)
    ours.base_model.model = liger_fx.optimize(ours.base_model.model)
    return ours


def fused(model: Any) -> list[str]:
    return [p for p, m in model.named_modules() if type(m).__name__ == "LigerLoraLinear"]


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients by name."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_layer_computes_what_peft_computes(dropout: float) -> None:
    theirs = adapted(lora_dropout=dropout)
    ours = optimized(theirs)
    assert len(fused(ours)) == 14
    assert "(q_proj): LigerLoraLinear(" in str(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    (loss, grads), (expected, true) = step(ours.train()), step(theirs.train())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, true)
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_gradients_in_bfloat16_are_as_accurate() -> None:
    """Promise 6, over all gradients together and for each."""
    errors: dict[str, list[float]] = {}
    theirs = adapted(torch.bfloat16)
    exact = step(copy.deepcopy(theirs).double().train())[1]
    found = step(theirs.train())[1], step(optimized(theirs).train())[1]
    for name, true in exact.items():
        errors[name] = [(grads[name].double() - true).norm().item() for grads in found]
    total = [sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in (0, 1)]
    assert total[1] <= 1.1 * total[0]
    assert all(ours <= 1.5 * original for original, ours in errors.values())


def test_no_copy_of_the_input_is_kept() -> None:
    """What autograd keeps for the backward, in bytes."""

    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=IDS.repeat(8, 4), labels=IDS.repeat(8, 4)).loss
        del loss
        return sum(sizes.values())

    theirs = adapted(torch.bfloat16)
    assert kept(optimized(theirs).train()) < 0.75 * kept(theirs.train())


def test_adapters_are_switched_added_merged_and_taken_off() -> None:
    theirs = adapted()
    ours = optimized(theirs)
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.add_adapter(
            "other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
    assert len(fused(ours)) == 14
    for change in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.set_adapter("default"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.delete_adapter("other"),
    ):
        change(theirs)
        change(ours)
        torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-5, rtol=1e-4)
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(ours.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-5, rtol=1e-4)


def test_adapters_put_on_afterwards() -> None:
    """Those in a fused MLP stay as PEFT computes them: the graph calls the MLP as one module."""
    torch.manual_seed(0)
    ours = peft.get_peft_model(
        liger_fx.optimize(tiny_model("llama", 2)),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    twin = copy.deepcopy(ours)
    step(ours.train())
    assert [path.rpartition(".")[2] for path in fused(ours)] == ["q_proj", "q_proj"]
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(ours))), logits(ours))
    torch.testing.assert_close(logits(twin), logits(ours))


def test_hooks_on_the_layers_inside_run() -> None:
    ours = optimized(adapted())
    seen: list[str] = []
    layer = ours.get_submodule(fused(ours)[0])
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append("A"))
    logits(ours)
    assert seen == ["base", "A"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "its adapters are of another kind: DoraLinearVariant")],
)
def test_other_kinds_of_adapters_stay(options: dict[str, Any], reason: str) -> None:
    ours = optimized(adapted(**options))
    assert not fused(ours)
    sites = [s for s in ours.base_model.model.report.sites if s.rule == "adapted_linear"]
    assert sites and all(site.reason and site.reason.startswith(reason) for site in sites)
