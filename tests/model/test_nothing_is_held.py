"""What a call is given lives no longer because the call was traced."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import liger_fx
from liger_fx.tracing.fakes import Sizes
from liger_fx.tracing.tracer import HFTracer
from tests.programs.models import tiny


class AsksItsData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x


class LayerThatAsks(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: Any = super().forward(hidden_states, *args, **kwargs)
        return result * 2 if float(result.sum()) > 1e9 else result


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["followed", "a module stays whole", "a layer falls back"])
@pytest.mark.filterwarnings("ignore::liger_fx.FallbackWarning")
def test_a_cache_goes_when_its_caller_lets_it_go(what: str) -> None:
    """At once, not when Python next collects: it may be gigabytes of a GPU."""
    model: Any = tiny("llama")
    if what == "a module stays whole":
        model.model.layers[0].mlp = AsksItsData()
    elif what == "a layer falls back":
        model.model.layers[0].__class__ = LayerThatAsks
    opt = liger_fx.optimize(model)
    ids = torch.arange(8)[None]
    with nothing_collected(), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        opt(ids, past_key_values=cache)
        opt(ids[:, :1], past_key_values=cache)
        gone = weakref.ref(cache)
        del cache
        assert gone() is None


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


def test_nothing_of_a_trace_stays() -> None:
    """A tensor holds its sizes where the collector cannot see it, and these lead to the rest."""
    before = [alive(kind) for kind in (Sizes, FakeTensor, HFTracer)]
    opt = liger_fx.optimize(tiny("llama"))
    opt(torch.arange(8)[None], labels=torch.arange(8)[None])
    assert [alive(kind) for kind in (Sizes, FakeTensor, HFTracer)] == before
