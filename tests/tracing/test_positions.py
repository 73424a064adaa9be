"""Positions that a model counts are not looked at for packed sequences; others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import create_causal_mask

import liger_fx
from liger_fx.tracing.leaves import build_mask
from liger_fx.tracing.positions import _BUILDERS
from tests.programs.models import tiny

Count = Callable[[torch.Tensor], torch.Tensor]


class Masked(nn.Module):
    """A mask of positions that ``count`` makes."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.config = LlamaConfig(hidden_size=8, num_attention_heads=2)
        self.config._attn_implementation = "sdpa"
        self.count = count

    def forward(self, x: torch.Tensor) -> Any:
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None,
            position_ids=self.count(x),
        )  # fmt: skip
        return torch.nn.functional.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], attn_mask=mask, is_causal=mask is None
        )


def written(x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[1])[None].expand(2, -1).clone()
    positions[:, 3:] = 0
    return positions


def written_through_a_view(x: torch.Tensor) -> torch.Tensor:
    counted = torch.arange(x.shape[1])
    counted[3:].sub_(3)
    return counted.unsqueeze(0)


COUNTED: list[Count] = [
    lambda x: torch.arange(x.shape[1]).unsqueeze(0),
    lambda x: (torch.arange(x.shape[1]) + 2).unsqueeze(0),
    lambda x: torch.arange(3, 3 + x.shape[1], dtype=torch.long).unsqueeze(0).expand(2, -1),
]
OTHERS: list[Count] = [
    written,
    written_through_a_view,
    lambda x: torch.arange(0, 2 * x.shape[1], 2).unsqueeze(0),
    lambda x: torch.arange(x.shape[1]).unsqueeze(0) + torch.tensor([0, 0, 0, 5, 5, 9]),
    lambda x: torch.arange(1).unsqueeze(0).expand(2, x.shape[1]),
    lambda x: torch.arange(x.shape[1]).unsqueeze(0).flip(-1),
    lambda x: (torch.arange(x.shape[1]) // 2).unsqueeze(0),
]


def positions_of_mask(opt: Any) -> Any:
    graph = opt._block.last.plan.graph
    (node,) = [n for n in graph.nodes if n.target is build_mask]
    return node.kwargs["position_ids"]


@pytest.mark.parametrize("count", [*COUNTED, *OTHERS])
def test_only_counted_positions_are_left_out(count: Count) -> None:
    model = Masked(count)
    x = torch.randn(2, 6, 8)
    opt = liger_fx.optimize(model, inputs={"x": x})
    torch.testing.assert_close(opt(x), Masked(count)(x), rtol=0, atol=0)
    assert (positions_of_mask(opt) is None) == (count in COUNTED)


@pytest.mark.parametrize("builder", sorted(_BUILDERS))
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("skips", [True, False])
def test_builders_ask_positions_for_nothing_else(
    builder: str, implementation: str, skips: bool
) -> None:
    config = LlamaConfig(sliding_window=4, attention_chunk_size=4)
    config._attn_implementation = implementation
    embeds = torch.randn(2, 6, 8)

    def mask(positions: torch.Tensor | None) -> Any:
        return getattr(masking_utils, builder)(
            config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None,
            position_ids=positions, allow_is_causal_skip=skips,
        )  # fmt: skip

    counted, none = mask(torch.arange(2, 8)[None]), mask(None)
    assert type(counted) is type(none)
    if none is not None:
        torch.testing.assert_close(counted, none, rtol=0, atol=0)


def test_packed_sequences_are_told_apart() -> None:
    """Given positions are looked at as ever."""
    model = tiny("llama")
    ids, packed = torch.arange(3, 15)[None], torch.arange(6).repeat(2)[None]
    plain, apart = (model(ids, position_ids=p, use_cache=False).logits for p in (None, packed))
    opt = liger_fx.optimize(model)
    for positions, logits in ((None, plain), (packed, apart)):
        out = opt(ids, position_ids=positions, use_cache=False)
        torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, apart, atol=1e-3)
