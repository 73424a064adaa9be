"""What cannot be traced, what breaks half way, threads, and models without data."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import liger_fx
from liger_fx.errors import UsageError
from tests.support.accuracy import furthest, measure
from tests.support.families import build, config, make_inputs
from tests.support.untouched import Untouched

ROUNDING = 3e-6


class Raises(nn.Module):
    """Stands for a module whose forward fails, once the trace has come as far as this."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


class Branches(nn.Module):
    """A module that asks the data for its way: no graph can follow it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() > 1e6:
            return x
        return self.inner(x)


def with_mlp(module: Callable[[nn.Module], nn.Module], layer: int = 1) -> Any:
    """A llama whose second layer's MLP is replaced."""
    model = build("llama")
    model.model.layers[layer].mlp = module(model.model.layers[layer].mlp)
    return model


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
def test_an_interrupted_trace_leaves_nothing_behind(error: BaseException) -> None:
    model = with_mlp(lambda _: Raises(error))
    before = Untouched(model)
    with pytest.raises(type(error)):
        liger_fx.optimize(model)
    assert before.changes() == []
    other = build("qwen3")
    opt = liger_fx.optimize(other)
    inputs = make_inputs(other, labels=True)
    assert furthest(measure(opt, inputs), measure(other, inputs)) < ROUNDING


def test_a_model_whose_forward_raises() -> None:
    """The module becomes an opaque leaf or the trace an error, and nothing stays patched."""
    model = with_mlp(lambda _: Raises(ValueError("no weights for this expert")))
    before = Untouched(model)
    with pytest.raises(liger_fx.TraceError) as caught:
        liger_fx.optimize(model)
    assert before.changes() == []
    text = str(caught.value)
    assert "model.layers.1.mlp" in text and "no weights for this expert" in text
    assert "test_failures.py" in text, "the source line is named"


def test_what_asks_for_data_stays_a_leaf_and_is_listed() -> None:
    model = with_mlp(Branches)
    before = Untouched(model)
    opt = liger_fx.optimize(model)
    assert before.changes() == []
    told = [line for line in opt.report.opaque if "model.layers.1.mlp" in line]
    assert len(told) == 1 and "Branches" in told[0] and "test_failures.py" in told[0]
    assert sum(site.rule == "gated_mlp" for site in opt.report.rewritten) == 1
    inputs = make_inputs(model, 2, 9, pad=True, labels=True)
    assert furthest(measure(opt, inputs), measure(model, inputs)) < ROUNDING


def test_an_error_at_run_time_leaves_the_modes_as_they_were() -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9)
    before = Untouched()
    inputs["input_ids"][0, 0] = 10**6  # no such token: the embedding raises
    with pytest.raises(IndexError):
        opt(**inputs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(IndexError):
        opt(**inputs)
    assert before.changes() == []


def test_two_threads_trace_two_models() -> None:
    names = ("llama", "gemma2")
    models = {name: build(name) for name in names}
    before = Untouched()
    results: dict[str, Any] = {}
    start = threading.Barrier(len(names))

    def work(name: str) -> None:
        start.wait()
        results[name] = liger_fx.optimize(models[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert before.changes() == []
    for name in names:
        inputs = make_inputs(models[name], 2, 9, pad=True, labels=True)
        ours, theirs = measure(results[name], inputs), measure(models[name], inputs)
        assert furthest(ours, theirs) < ROUNDING


def test_a_thread_that_runs_a_model_while_another_traces() -> None:
    model, other = build("llama"), build("gemma3_text")
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = model(**inputs).logits
    done, wrong = threading.Event(), []

    def keep_running() -> None:
        with torch.no_grad():
            while not done.is_set():
                if not torch.equal(model(**inputs).logits, expected):
                    wrong.append(1)

    thread = threading.Thread(target=keep_running)
    thread.start()
    try:
        liger_fx.optimize(other)
        liger_fx.optimize(model)
    finally:
        done.set()
        thread.join(timeout=60)
    assert wrong == []


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3_text"])
def test_a_model_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(name))
    opt = liger_fx.optimize(model.eval())
    real = liger_fx.optimize(build(name))
    assert [(s.rule, s.path, s.after_class) for s in opt.report.rewritten] == [
        (s.rule, s.path, s.after_class) for s in real.report.rewritten
    ]
    assert {p.device.type for p in opt.parameters()} == {"meta"}


def test_nothing_rewritten_is_a_warning() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.tanh() + 1

    with pytest.warns(liger_fx.NothingRewrittenWarning):
        opt = liger_fx.optimize(Plain(), inputs=(torch.ones(2, 3),))
    assert torch.equal(opt(torch.ones(4, 3)), torch.ones(4, 3).tanh() + 1)


@pytest.mark.parametrize("thing", [{"a": 1}, None, "llama", torch.ones(2), nn.Linear])
def test_what_is_no_model_is_refused_in_one_sentence(thing: Any) -> None:
    with pytest.raises(liger_fx.LigerFxError) as caught:
        liger_fx.optimize(thing)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


def test_strict_raises_where_a_site_was_missed() -> None:
    model = build("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(liger_fx.LigerFxError, match="its experts_implementation is eager"):
        liger_fx.optimize(model, strict=True)
    liger_fx.optimize(build("llama"), strict=True)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_block_that_was_wrapped_is_called_through_its_wrapper() -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9)
    before = opt(**inputs).logits
    opt.model.layers[0] = Wrapper(opt.model.layers[0])
    assert torch.equal(opt(**inputs).logits, before)


def test_what_is_gone_is_missed_as_the_original_misses_it() -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9)
    opt(**inputs)
    del opt.model.layers[1].self_attn.q_proj
    with (
        pytest.warns(liger_fx.FallbackWarning, match=r"model\.layers\.1.*no attribute 'q_proj'"),
        pytest.raises(AttributeError, match="q_proj"),
    ):
        opt(**inputs)


def test_an_attribute_error_of_the_model_itself_stays_one() -> None:
    model = with_mlp(Branches)
    opt = liger_fx.optimize(model)
    opt.model.layers[1].mlp.inner.act_fn = None
    del opt.model.layers[1].mlp.inner
    with pytest.raises(AttributeError, match="inner"):
        opt(**make_inputs(model, 2, 9))


def test_torch_compile_goes_through_the_graphs() -> None:
    model = build("llama")
    opt = liger_fx.optimize(model)
    inputs = make_inputs(model, 2, 9, labels=True)
    expected = opt(**inputs)
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph)
        return graph

    compiled = torch.compile(opt, backend=backend, fullgraph=True)
    results = [compiled(**inputs) for _ in range(2)]
    assert all(torch.equal(result.logits, expected.logits) for result in results)
    results[0].loss.backward()
    assert len(seen) == 1
    ours = [n for n in seen[0].graph.nodes if "liger_fx" in str(n.target)]
    # The loss is computed from the logits there, which are a result of what is compiled.
    sites = [s for s in opt.report.rewritten if s.rule != "linear_cross_entropy"]
    assert len(ours) >= len(sites), "our operators are nodes of what is compiled"


class TakesArgs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_inputs_without_names_are_told() -> None:
    with pytest.raises(UsageError, match=r"1 positional argument where .*\*args"):
        liger_fx.trace(TakesArgs(), inputs=(torch.ones(2, 4),))


@pytest.mark.parametrize("inputs", [5, torch.ones(2, 4), "ids"], ids=["int", "tensor", "text"])
def test_inputs_of_another_kind_are_told(inputs: Any) -> None:
    with pytest.raises(UsageError, match="tuple of positional arguments or a mapping"):
        liger_fx.trace(nn.Linear(4, 4), inputs=inputs)


@pytest.mark.parametrize("text", [f"{'word ' * 90}end", f"one\n{'word ' * 90}"])
def test_a_long_error_is_told_in_whole_words(text: str) -> None:
    model = with_mlp(lambda _: Raises(ValueError(text)))
    with pytest.raises(liger_fx.TraceError) as caught:
        liger_fx.optimize(model)
    first = " ".join(text.splitlines()[0].split())
    assert first in caught.value.cause
    assert caught.value.cause.endswith((" word ...", first))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_a_parametrized_module_is_listed() -> None:
    model = build("llama")
    torch.nn.utils.parametrize.register_parametrization(model.model.norm, "weight", Doubled())
    opt = liger_fx.optimize(model)
    (told,) = opt.report.opaque
    assert told.startswith("model.norm:") and "parametrize" in told
    inputs = make_inputs(model, 2, 9, pad=True)
    with torch.no_grad():
        assert torch.allclose(opt(**inputs).logits, model(**inputs).logits, atol=1e-5)
