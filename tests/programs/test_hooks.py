"""Hooks on any module, put on before optimize or after: once a call, on real data, heeded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.programs.support import (
    CHECK,
    build,
    compare,
    gradients,
    graph_runs,
    make_inputs,
    optimize,
    run,
    same,
)

PLACES = {
    "root": "",
    "base model": "model",
    "embedding": "model.embed_tokens",
    "layer": "model.layers.1",
    "attention": "model.layers.1.self_attn",
    "linear": "model.layers.1.self_attn.q_proj",
    "mlp": "model.layers.1.mlp",
    "linear in the mlp": "model.layers.1.mlp.up_proj",
    "norm": "model.layers.1.input_layernorm",
    "norm of a sum": "model.layers.1.post_attention_layernorm",
    "last norm": "model.norm",
    "head": "lm_head",
    "rotary tables": "model.rotary_emb",
}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors(item)]
    return []


class Diary:
    """What hooks were called with; a trace's stand-ins for data are noted as such."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[float]]] = []

    def note(self, what: str, *values: Any) -> None:
        found = [t for value in values for t in tensors(value) if t is not None]
        if any(isinstance(t, FakeTensor) for t in found):
            # not raised here: what traces might take it for the model's own error
            self.calls.append(("called by a trace", []))
            return
        numbers = [float(t.detach().double().norm()) for t in found if t.is_floating_point()]
        self.calls.append((what, numbers))

    def __deepcopy__(self, memo: Any) -> Diary:
        return self  # hooks of copies write into the same diary


def forward_hook(module: nn.Module, diary: Diary) -> Any:
    return module.register_forward_hook(lambda _, args, out: diary.note("forward", args, out))


def forward_hook_kwargs(module: nn.Module, diary: Diary) -> Any:
    def hook(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        diary.note("forward", args, {k: v for k, v in kwargs.items() if v is not None}, out)

    return module.register_forward_hook(hook, with_kwargs=True)


def pre_hook(module: nn.Module, diary: Diary) -> Any:
    return module.register_forward_pre_hook(lambda _, args: diary.note("pre", args))


def backward_hook(module: nn.Module, diary: Diary) -> Any:
    return module.register_full_backward_hook(
        lambda _, given, out: diary.note("backward", given, out)
    )


def backward_pre_hook(module: nn.Module, diary: Diary) -> Any:
    return module.register_full_backward_pre_hook(lambda _, out: diary.note("before", out))


KINDS: dict[str, Callable[[nn.Module, Diary], Any]] = {
    "forward": forward_hook,
    "forward with keywords": forward_hook_kwargs,
    "pre": pre_hook,
    "backward": backward_hook,
    "backward pre": backward_pre_hook,
}


def step(m: Any) -> Any:
    m.zero_grad(set_to_none=True)
    m(**make_inputs(m, 2, 9, labels=True), use_cache=False).loss.backward()
    return gradients(m)


def numbers(diary: Diary) -> list[Any]:
    return [[what, torch.tensor(found)] for what, found in diary.calls]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_called_once_a_call(place: str, kind: str, when: str) -> None:
    """As often as in the original, with the same data, and never while optimize runs."""
    if "backward" in kind and place in ("embedding", "rotary tables"):
        pytest.skip("nothing that goes in there needs a gradient: PyTorch warns and skips it")
    model, twin_of = build("llama"), build("llama")
    theirs, ours = Diary(), Diary()
    KINDS[kind](twin_of.get_submodule(PLACES[place]), theirs)
    if when == "before":
        KINDS[kind](model.get_submodule(PLACES[place]), ours)
    opt = optimize(model)
    assert ours.calls == [], "a hook was called by optimize"
    if when == "after":
        KINDS[kind](opt.get_submodule(PLACES[place]), ours)
    expected = [step(twin_of) for _ in range(2)]
    # PyTorch calls no backward hook of a module whose output is a dictionary
    silent = "backward" in kind and place in ("root", "base model")
    assert len(theirs.calls) == (0 if silent else 2)
    with graph_runs(opt, calls=_other_layers(place)):
        same([step(opt) for _ in range(2)], expected)
        same(numbers(ours), numbers(theirs))


def _other_layers(place: str) -> int:
    """How often the rotary modules run on average in two steps: the layer with the hook may run
    its original forward, the other one is a graph."""
    return 1 if "layers" in PLACES[place] else 2


@pytest.mark.parametrize(
    "place", ["layer", "attention", "mlp", "norm", "norm of a sum", "linear", "base model"]
)
def test_what_a_hook_returns_counts(place: str) -> None:
    def program(m: Any) -> Any:
        def double(_: Any, args: Any, out: Any) -> Any:
            if isinstance(out, torch.Tensor):
                return out * 2
            if isinstance(out, tuple):
                return (out[0] * 2, *out[1:])
            out.last_hidden_state = out.last_hidden_state * 2
            return out

        before = step(m)
        handle = m.get_submodule(PLACES[place]).register_forward_hook(double)
        changed = step(m)
        handle.remove()
        return before, changed, step(m)

    first, second, third = run(program, build("llama"))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    same(third, first)
    compare(build("llama"), program, calls=2)


@pytest.mark.parametrize("place", ["layer", "attention", "norm", "norm of a sum", "linear"])
def test_what_a_pre_hook_returns_counts(place: str) -> None:
    def program(m: Any) -> Any:
        before = step(m)

        def scale(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] * 1.5, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 1.5}

        module = m.get_submodule(PLACES[place])
        handle = module.register_forward_pre_hook(scale, with_kwargs=True)
        changed = step(m)
        handle.remove()
        return before, changed, step(m)

    compare(build("llama"), program, calls=2)


@pytest.mark.parametrize("place", ["layer", "norm of a sum"])
@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
def test_a_backward_hook_may_change_the_gradient(place: str, called: bool) -> None:
    def program(m: Any) -> Any:
        before = [step(m)] * called
        m.get_submodule(PLACES[place]).register_full_backward_hook(
            lambda _, given, out: tuple(None if g is None else g * 3 for g in given)
        )
        return before, step(m)

    compare(build("llama"), program)


def test_a_hook_on_the_head_of_a_copy() -> None:
    """Its loss is a named module, and the head is not called; a copy knows of no result yet."""
    opt = optimize(build("llama")).train()
    step(opt)
    diary, twin = Diary(), copy.deepcopy(opt)
    forward_hook(twin.lm_head, diary)
    step(twin)
    assert len(diary.calls) == 1


def test_activations_are_caught() -> None:
    """The common way to look inside: the outputs of all layers, stored by hooks."""

    def program(m: Any) -> Any:
        seen: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(_: Any, args: Any, out: Any) -> None:
                seen[name] = (out[0] if isinstance(out, tuple) else out).detach()

            return hook

        handles = [
            m.get_submodule(path).register_forward_hook(keep(path))
            for path in PLACES.values()
            if path.startswith("model.layers")
        ]
        with torch.no_grad():
            m(**make_inputs(m, 2, 9))
        for handle in handles:
            handle.remove()
        assert len(seen) == sum(p.startswith("model.layers") for p in PLACES.values())
        return seen

    original = build("llama")
    opt = optimize(build("llama"))
    same(run(program, opt), run(program, original))


def test_hooks_in_generate() -> None:
    """Steering: a hook on a layer adds a vector at every step."""

    def program(m: Any) -> Any:
        counts = []
        vector = torch.linspace(-1, 1, m.config.hidden_size)

        def steer(_: Any, args: Any, out: Any) -> Any:
            counts.append(1)
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        handle = m.model.layers[0].register_forward_hook(steer)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        steered = m.generate(**make_inputs(m, 2, 5), **options)
        handle.remove()
        assert len(counts) == 6
        return steered, m.generate(**make_inputs(m, 2, 5), **options)

    compare(build("llama"), program, calls=6)


def test_hooks_on_parameters_and_tensors() -> None:
    """Gradient hooks of parameters run as they did, and after accumulation."""

    def program(m: Any) -> Any:
        order: list[str] = []
        for name, parameter in m.named_parameters():
            parameter.register_hook(lambda g: g * 2)
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name))
        found = step(m)
        return found, sorted(order)

    compare(build("llama"), program)


def test_hooks_of_all_modules() -> None:
    """torch.nn.modules.module's global hooks: they see each module, so no graph runs."""

    def program(m: Any) -> Any:
        names: list[str] = []
        module = torch.nn.modules.module
        handle = module.register_module_forward_hook(
            lambda sub, args, out: names.append(type(sub).__name__)
        )
        try:
            found = step(m)
        finally:
            handle.remove()
        replaced = ("LlamaRMSNorm", "LlamaMLP", "LlamaRotaryEmbedding", "SiLUActivation")
        kept = [n for n in names if n not in replaced and not n.startswith("Liger")]
        return found, kept

    opt = compare(build("llama"), program, calls=0)
    with graph_runs(opt):
        step(opt)


def test_the_hooks_of_the_original_are_its_own() -> None:
    """What is put on the result is not on the model it was made from, and the other way round."""
    model = build("llama")
    opt = optimize(model)
    of_model, of_opt = Diary(), Diary()
    forward_hook(model.model.layers[0], of_model)
    forward_hook(opt.model.layers[1], of_opt)
    step(opt)
    assert (len(of_model.calls), len(of_opt.calls)) == (0, 1)
    step(model)
    assert (len(of_model.calls), len(of_opt.calls)) == (1, 1)


def test_hooks_go_along_with_copies() -> None:
    diary = Diary()
    opt = optimize(build("llama"))
    forward_hook(opt.model.layers[0], diary)
    twin = copy.deepcopy(opt)
    step(twin)
    assert len(diary.calls) == 1
    if CHECK == "graphs":
        with graph_runs(twin):
            step(twin)
