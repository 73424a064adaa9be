"""The rotary modules stand in for the models' own apply_rotary_pos_emb."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    apply_rotary_pos_emb_interleave as deepseek,
)
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm4
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo2
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

from liger_fx.modules import LigerRotaryEmbedding, LigerSingleRotaryEmbedding

INTERLEAVED = {"interleaved_in": True, "interleaved_out": True}

# (the model's function, the width of its tables for heads of 16, the part of the tables that the
# module reads, the module's arguments)
MODELS: dict[str, tuple[Any, int, int, dict[str, Any]]] = {
    "llama": (llama, 16, 16, {}),
    "olmo2": (olmo2, 16, 16, {"cast": "input"}),
    "phi3, part of the head": (phi3, 12, 12, {}),
    "glm4, part of the head": (glm4, 8, 4, INTERLEAVED | {"half_tables": True}),
    "cohere": (cohere, 16, 16, INTERLEAVED | {"cast": "input"}),
    "deepseek_v3": (deepseek, 16, 8, {"interleaved_in": True, "half_tables": True}),
    "gpt_oss": (gpt_oss, 8, 8, {"half_tables": True}),
}
models = pytest.mark.parametrize("model", MODELS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def distance(values: Any, exact: Any) -> float:
    pairs = zip(values, exact, strict=True)
    return max(((v.double() - e).norm() / e.norm()).item() for v, e in pairs)


@models
@dtypes
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads_dim", [1, 2])
def test_value_and_dtype(
    model: str, dtype: torch.dtype, table_dtype: torch.dtype, heads_dim: int
) -> None:
    function, width, part, arguments = MODELS[model]
    torch.manual_seed(0)
    shapes = [(2, 5, heads, 16) if heads_dim == 2 else (2, heads, 5, 16) for heads in (3, 1)]
    q, k = (torch.randn(shape).to(dtype) for shape in shapes)
    cos, sin = torch.randn(2, 1, 5, width).to(table_dtype)
    eager = function(q, k, cos, sin, unsqueeze_dim=heads_dim)
    exact = function(*(t.double() for t in (q, k, cos, sin)), unsqueeze_dim=heads_dim)
    if model == "cohere":  # its float() throws float64 away
        exact = tuple(t.double() for t in exact)
    cos, sin = cos[..., :part], sin[..., :part]
    found = LigerRotaryEmbedding(heads_dim=heads_dim, **arguments)(q, k, cos, sin)
    single = LigerSingleRotaryEmbedding(heads_dim=heads_dim, **arguments)
    assert [t.dtype for t in found] == [t.dtype for t in eager]
    assert distance(found, exact) <= 1.1 * distance(eager, exact) + 2e-7
    assert torch.equal(single(q, cos, sin), found[0])
    assert torch.equal(single(k, cos, sin), found[1])


def test_tables_that_learn() -> None:
    q, k = torch.randn(2, 2, 3, 5, 8)
    tables = torch.randn(2, 1, 5, 8, requires_grad=True)
    grads = [
        torch.autograd.grad(sum(t.square().sum() for t in f(q, k, *tables)), tables)[0]
        for f in (LigerRotaryEmbedding(), llama)
    ]
    torch.testing.assert_close(*grads)


def test_unlike_dtypes_stay_their_own() -> None:
    q, k = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16), torch.randn(1, 2, 5, 8)
    found = LigerRotaryEmbedding(cast="input")(q, k, *torch.randn(2, 1, 5, 8))
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]


def test_copies_like_a_module() -> None:
    module = LigerRotaryEmbedding(interleaved_in=True, half_tables=True)
    inputs = (*torch.randn(2, 1, 2, 5, 8), *torch.randn(2, 1, 5, 4))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)).to(torch.float64)):
        assert type(other) is LigerRotaryEmbedding
        assert all(map(torch.equal, other(*inputs), module(*inputs)))


def test_repr() -> None:
    assert repr(LigerRotaryEmbedding()) == "LigerRotaryEmbedding(half-split)"
    module = LigerSingleRotaryEmbedding(
        interleaved_in=True, half_tables=True, cast="input", heads_dim=2, rotary_dim=8, head_dim=16
    )
    assert repr(module) == (
        "LigerSingleRotaryEmbedding(8 of 16, interleaved -> half-split, half_tables=True, "
        "heads_dim=2, cast=input)"
    )


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="heads_dim must be 1 or 2, not 3"):
        LigerRotaryEmbedding(heads_dim=3)
    with pytest.raises(ValueError, match="cast must be one of"):
        LigerRotaryEmbedding(cast="float")  # type: ignore[arg-type]
