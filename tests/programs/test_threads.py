"""Several threads make the first calls of one model at once: right, by graphs, without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.programs.support import build, graph_runs, make_inputs, optimize, same, train_step

THREADS = 8


def at_once(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """The results of ``work(i)`` of threads that begin together."""
    start = threading.Barrier(count)

    def one(i: int) -> Any:
        start.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return [
            future.result(timeout=300) for future in [pool.submit(one, i) for i in range(count)]
        ]


def kinds(m: Any, i: int) -> dict[str, Any]:
    """Calls of several kinds: with labels, without a mask, positions, embeddings."""
    inputs: dict[str, Any] = make_inputs(
        m, 1 + i % 3, 5 + i, labels=i % 2 == 0, positions=i % 4 == 1, embeds=i % 4 == 3, seed=i
    )
    return inputs


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize("alike", [True, False], ids=["one kind", "several kinds"])
def test_first_calls(name: str, alike: bool) -> None:
    model, twin_of = build(name), build(name)
    opt = optimize(model)
    given = [make_inputs(model, 2, 9, seed=i) if alike else kinds(model, i) for i in range(THREADS)]

    def call(m: Any, i: int) -> torch.Tensor:
        with torch.no_grad():
            return m(**given[i]).logits

    theirs = [call(twin_of, i) for i in range(THREADS)]
    with graph_runs(opt, calls=THREADS, quiet=True):
        same(at_once(lambda i: call(opt, i)), theirs)
    with graph_runs(opt, calls=THREADS, quiet=True):
        same(at_once(lambda i: call(opt, i)), theirs)


def test_generate_at_once() -> None:
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def generate(m: Any, i: int) -> torch.Tensor:
        return m.generate(**make_inputs(m, 1 + i % 2, 4 + i, seed=i), **options)

    theirs = [generate(twin_of, i) for i in range(THREADS)]
    with graph_runs(opt, calls=THREADS * 4, quiet=True):
        same(at_once(lambda i: generate(opt, i)), theirs)


@pytest.mark.slow
def test_modes_of_threads_are_their_own() -> None:
    """Some threads record gradients, others are in inference mode or under autocast."""
    model, twin_of = build("llama"), build("llama")
    opt = optimize(model)

    def call(m: Any, i: int) -> Any:
        inputs = make_inputs(m, 2, 9, seed=i)
        if i % 3 == 0:
            (found,) = torch.autograd.grad(
                m(**inputs).logits.square().mean(), [m.model.norm.weight]
            )
            return found
        if i % 3 == 1:
            with torch.inference_mode():
                return m(**inputs).logits.clone()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return m(**inputs).logits.float()

    theirs = [call(twin_of, i) for i in range(THREADS)]
    with graph_runs(opt, calls=THREADS, quiet=True):
        found = at_once(lambda i: call(opt, i))
    for i in range(THREADS):
        bound = 0.05 if i % 3 == 2 else 1e-4
        same(found[i], theirs[i], rtol=bound, atol=bound)


@pytest.mark.slow
def test_optimize_at_once() -> None:
    """Eight results of one model, made at once."""
    model, twin_of = build("llama"), build("llama")
    inputs = make_inputs(model, 2, 9)
    with torch.no_grad():
        expected = twin_of(**inputs).logits
    for opt in at_once(lambda i: optimize(model)):
        with graph_runs(opt), torch.no_grad():
            same(opt(**inputs).logits, expected)


@pytest.mark.slow
def test_one_trains_while_others_look() -> None:
    """A model in training and its copies in use."""
    model, twin_of = build("llama"), build("llama")
    opts = [optimize(build("llama", seed=i)) for i in range(4)]
    twins = [build("llama", seed=i) for i in range(4)]
    inputs = make_inputs(model, 2, 9, labels=True)
    theirs = [train_step(m, inputs) for m in twins]
    del twin_of
    with graph_runs(opts[0], calls=4, quiet=True):
        same(at_once(lambda i: train_step(opts[i], inputs), 4), theirs)
