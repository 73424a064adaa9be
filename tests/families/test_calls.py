"""Promise 5: a call unlike the one traced is traced once and kept; the assumptions are readable."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import liger_fx
from tests.support.accuracy import Run, furthest, measure
from tests.support.families import make_inputs
from tests.support.pairs import fresh

ROUNDING = 3e-6


def run(model: Any, **options: Any) -> Run:
    return measure(model, make_inputs(model, 2, 9, pad=True, labels=True, **options))


def agrees(model: Any, opt: Any, autocast: torch.dtype | None = None, **options: Any) -> bool:
    """Same loss and gradients, at two sizes."""
    for batch, length in ((2, 9), (1, 13)):
        inputs = make_inputs(model, batch, length, pad=True, labels=True, **options)
        ours, theirs = (measure(m, inputs, autocast=autocast) for m in (opt, model))
        bound = ROUNDING if autocast is None else 0.02
        if furthest(ours, theirs) > bound:
            return False
    return True


def test_each_kind_of_call_is_traced_once_and_kept() -> None:
    model, opt = fresh("llama")
    assert len(opt.plans) == 1
    kinds: list[dict[str, Any]] = [
        {},
        {"positions": True},
        {"embeds": True},
        {"embeds": True, "positions": True},
        {"autocast": torch.bfloat16},
    ]
    for number, options in enumerate(kinds, start=2):
        assert agrees(model, opt, **options), options
        assert len(opt.plans) == number, f"{options} was traced once"
    model.train()
    opt.train()
    assert agrees(model, opt)
    assert len(opt.plans) == len(kinds) + 2
    for m in (model, opt):
        m.eval()
    assert all(agrees(model, opt, **options) for options in kinds)
    with torch.no_grad():
        inputs = make_inputs(model, 5, 23)
        assert torch.allclose(opt(**inputs).logits, model(**inputs).logits, atol=1e-5)
    traced = len(opt.plans)
    with torch.no_grad():
        opt(**make_inputs(model, 1, 1))
    assert len(opt.plans) == traced, "sizes are no reason to trace again"


def test_the_same_inputs_without_a_mask() -> None:
    model, opt = fresh("mistral")
    ids = make_inputs(model, 2, 19)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(opt(ids).logits, model(ids).logits, atol=1e-5)
        assert torch.allclose(opt(ids, labels=ids).loss, model(ids, labels=ids).loss, atol=1e-5)


def test_left_padding_and_all_ones_masks() -> None:
    """A builder drops an all-ones mask when it runs; a graph traced with either serves both."""
    for name in ("llama", "gemma3_text", "cohere2"):
        model, opt = fresh(name)
        inputs = make_inputs(model, 2, 9)
        for width in (0, 4):
            inputs["attention_mask"][0, :width] = 0
            positions = inputs["attention_mask"].cumsum(-1) - 1
            inputs["position_ids"] = positions.clamp(min=0)
            kept = inputs["attention_mask"].bool()
            with torch.no_grad():
                ours, theirs = (m(**inputs).logits[kept] for m in (opt, model))
            assert torch.allclose(ours, theirs, atol=1e-5), (name, width)


def test_guards_are_readable_and_true() -> None:
    _, opt = fresh("llama")
    told = "\n".join(opt.report.guards)
    for fact in ("input_ids", "batch", "sequence", "eval mode", "autocast", "dtype"):
        assert fact in told, f"{fact} is not in:\n{told}"
    assert not any("object at 0x" in line for line in opt.report.guards)


def negate(module: Any, args: Any, output: Any) -> Any:
    return -output[0], output[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: setattr(m.config, "use_cache", False),
        lambda m: m.lm_head.register_forward_hook(lambda *_: None),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.model.layers[0].self_attn.register_forward_hook(negate),
    ],
    ids=["train", "config", "hook on a leaf", "dtype", "hook inside"],
)
def test_a_change_of_the_model_is_noticed(change: Any) -> None:
    """Whatever the trace assumed may change afterwards; the answer then follows the original's."""
    model, opt = fresh("qwen2")
    inputs = make_inputs(model, 2, 9, pad=True)
    with torch.no_grad():
        opt(**inputs)
    for m in (model, opt):
        change(m)
    with torch.no_grad():
        ours, theirs = opt(**inputs), model(**inputs)
    assert list(ours) == list(theirs)
    bound = 3e-2 if theirs.logits.dtype is torch.bfloat16 else 1e-5
    assert torch.allclose(ours.logits, theirs.logits, atol=bound)


def hook_calls(model: Any, register: Any, inputs: Any) -> list[str]:
    """The classes of the modules that a hook was called for, in a forward and backward."""
    calls: list[str] = []
    handle = register(model, lambda module, *_: calls.append(type(module).__name__))
    try:
        model(**inputs).loss.backward()
    finally:
        handle.remove()
    return calls


BACKWARD_HOOKS = {
    "full": lambda m, hook: m.model.layers[0].register_full_backward_hook(hook),
    "pre": lambda m, hook: m.model.layers[0].register_full_backward_pre_hook(hook),
    "leaf": lambda m, hook: m.lm_head.register_full_backward_hook(hook),
    "global": lambda _, hook: torch.nn.modules.module.register_module_forward_hook(hook),
    "global pre": lambda _, hook: torch.nn.modules.module.register_module_forward_pre_hook(hook),
    "global backward": lambda _, hook: torch.nn.modules.module.register_module_full_backward_hook(
        hook
    ),
}


@pytest.mark.parametrize("kind", BACKWARD_HOOKS)
def test_hooks_are_called(kind: str) -> None:
    model, opt = fresh("llama")
    inputs = make_inputs(model, 2, 9, labels=True)
    opt(**inputs)
    expected, found = (hook_calls(m, BACKWARD_HOOKS[kind], inputs) for m in (model, opt))
    assert expected
    if kind in ("full", "pre", "leaf"):
        assert found == expected
    else:
        assert found.count("LlamaAttention") == expected.count("LlamaAttention") == 2
    plans = len(opt.plans)
    opt(**inputs)
    assert len(opt.plans) == plans, "without the hook the graph serves again"


def test_a_hook_from_before_keeps_its_module() -> None:
    """A block is called, hooks around it; a module inside that has one stays a module."""
    model, _ = fresh("llama")
    seen: list[str] = []
    model.model.layers[0].register_full_backward_hook(lambda *_: seen.append("layer"))
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append("attention"))
    opt = liger_fx.optimize(model)
    assert seen == []
    sites = {(site.rule, site.path) for site in opt.report.rewritten}
    assert ("rotary_embedding", "model.layers.0.self_attn") in sites
    assert ("rotary_embedding", "model.layers.1.self_attn") not in sites
    assert any("a hook stands on it" in line for line in opt.report.opaque)
    inputs = make_inputs(model, 2, 9, labels=True)
    opt(**inputs).loss.backward()
    assert seen == ["attention", "layer"]


class HasDefault(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, scale: float | None = 3.0, shift: float | None = None
    ) -> torch.Tensor:
        return x * (1.0 if scale is None else scale) + (shift or 0.0)


def test_none_is_not_the_default() -> None:
    model, x = HasDefault(), torch.ones(2, 4)
    opt = liger_fx.trace(model, inputs=(x,))
    for args in ((x,), (x, None), (x, 2.0), (x, None, None), (x, 3.0, 1.0)):
        assert torch.equal(opt(*args), model(*args)), args[1:]
    assert torch.equal(opt(x, scale=None), model(x, scale=None))
    assert torch.equal(opt(x, shift=None), model(x))
    assert len(opt.plans) == 4
