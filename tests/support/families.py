"""Tiny random-weight models of the fifteen held model families, and inputs for them.

    build("llama")  ->  LlamaForCausalLM, 2 layers, 56 wide, 4 query heads on 2 key heads

The sizes are small and odd: a hidden width that is no power of two and differs from heads x
head_dim, grouped query heads, a vocabulary of prime size, and a sliding window shorter than the
longest input. `scale` widens a model for a GPU, where heads of 64 or 128 take other code paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 131
PAD = 0
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
THREE_LOCAL = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Scale:
    """The widths that every family shares; `head_dim` is even, `hidden` a multiple of `heads`."""

    hidden: int = 56
    intermediate: int = 88
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2


TINY = Scale()

# What a family needs beyond the shared widths to be itself: its own multipliers, partial rotary
# factors and windows, so that no rule is exercised at a value that hides a mistake (1.0, off).
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 16, "layer_types": LOCAL_GLOBAL},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 16, "layer_types": LOCAL_GLOBAL},
    "phi3": {"partial_rotary_factor": 0.75},
    "glm4": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "cohere2": {
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "layer_types": THREE_LOCAL,
        "logit_scale": 0.7,
    },
    "granite": {
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 40,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
FAMILIES = tuple(OWN)

# Settings under which a router has nothing to choose. In a short dtype two runs of equal accuracy
# send a token that stands between two experts to different ones, which says nothing of either.
EVERY_EXPERT: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_experts_per_tok": 4, "topk_group": 2},
    "mixtral": {"num_experts_per_tok": 4},
}


def config(name: str, scale: Scale = TINY, **overrides: Any) -> Any:
    """The tiny config of a family; `overrides` win over the family's own settings."""
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": scale.hidden,
        "intermediate_size": scale.intermediate,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.kv_heads,
        "head_dim": scale.head_dim,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CONFIG_MAPPING[name](**shared | OWN[name] | _derived(name, scale) | overrides)


def _derived(name: str, scale: Scale) -> dict[str, Any]:
    """Settings that follow from the shared widths in some families."""
    if name == "phi3":  # works its head width out from the hidden width
        return {"hidden_size": scale.heads * scale.head_dim}
    if name == "deepseek_v3":
        return {
            "head_dim": scale.head_dim // 2,
            "num_key_value_heads": scale.heads,
            "q_lora_rank": scale.hidden // 2 - 4,
            "kv_lora_rank": scale.head_dim,
            "qk_rope_head_dim": scale.head_dim // 2,
            "qk_nope_head_dim": scale.head_dim,
            "v_head_dim": scale.head_dim,
        }
    return {}


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scale: Scale = TINY,
    attention: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A family's model in eval mode with tame random weights, the same for the same seed.

    The weights are drawn in float32 and rounded to `dtype`. Norm weights and biases are moved off
    their constant start, so that a rule that forgets one of them shows.
    """
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(
        config(name, scale, **overrides), attn_implementation=attention, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.08)
            else:
                parameter.add_(noise * 0.05)
    return made.to(device=device, dtype=dtype).eval()


def make_inputs(
    model: torch.nn.Module,
    batch: int = 3,
    length: int = 11,
    *,
    pad: bool = False,
    labels: bool = False,
    positions: bool = False,
    embeds: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward call.

    Gives input_ids (batch, length) int64, or with `embeds` inputs_embeds (batch, length, hidden) in
    the model's dtype; attention_mask (batch, length) int64, with `pad` zero on a right-hand stretch
    of every second row; with `labels` the ids, -100 on the padding; with `positions` position_ids
    that begin at 3.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    device = weight.device
    ids = torch.randint(3, weight.shape[0], (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    if pad:
        mask[1::2, length - length // 3 :] = 0
        ids = ids.masked_fill(mask == 0, PAD)
    inputs = {"attention_mask": mask}
    if embeds:
        noise = torch.randn(batch, length, weight.shape[1], generator=generator)
        inputs["inputs_embeds"] = (noise * 0.3).to(weight.dtype)
    else:
        inputs["input_ids"] = ids
    if labels:
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    if positions:
        inputs["position_ids"] = torch.arange(3, 3 + length).expand(batch, length).contiguous()
    return {name: tensor.to(device) for name, tensor in inputs.items()}
