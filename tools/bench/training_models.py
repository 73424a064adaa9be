"""The models that the training step is measured on: real shapes, some of them with fewer layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# name -> model type and sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "llama8b": (  # 8 of the 32 layers
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "qwen3": (  # the 1.7B shape, 14 of its 28 layers
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 14,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "gemma2": (  # the 2B shape, 8 of its 26 layers
        "gemma2",
        {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
    "olmo2": (  # the 7B shape, 8 of its 32 layers
        "olmo2",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 100352,
        },
    ),
    "glm4": (  # the 9B shape, 8 of its 40 layers
        "glm4",
        {
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "vocab_size": 151552,
        },
    ),
    "smollm3": (  # the 3B shape, 12 of its 36 layers
        "smollm3",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 128256,
        },
    ),
    "qwen3_moe": (  # the 30B-A3B shape, 6 of its 48 layers
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "tiny": (  # for a look at the script itself, on any device
        "llama",
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
    ),
}


@dataclass(frozen=True)
class Workload:
    """A training step of one of the models; ``lora`` puts adapters of rank 16 on all linear layers
    but the head."""

    model: str
    batch: int = 4
    length: int = 2048
    checkpointed: bool = False
    lora: bool = False


WORKLOADS = {
    "llama1b": Workload("llama1b"),
    "llama8b": Workload("llama8b"),
    "qwen3": Workload("qwen3"),
    "gemma2": Workload("gemma2"),
    "olmo2": Workload("olmo2"),
    "glm4": Workload("glm4"),
    "smollm3": Workload("smollm3"),
    "qwen3_moe": Workload("qwen3_moe"),
    "llama1b_long": Workload("llama1b", batch=1, length=16384),
    "llama1b_short": Workload("llama1b", batch=1, length=128),
    "llama1b_checkpointed": Workload("llama1b", batch=8, checkpointed=True),
    "llama8b_lora": Workload("llama8b", lora=True),
    "llama8b_lora_checkpointed": Workload("llama8b", batch=8, checkpointed=True, lora=True),
    "tiny": Workload("tiny", batch=2, length=64),
    "tiny_lora_checkpointed": Workload("tiny", 2, 64, checkpointed=True, lora=True),
}


def prepare(workload: Workload) -> Any:
    """The model that is trained, adapters and checkpointing on."""
    model: Any = build(workload.model)
    if workload.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if workload.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, config)
        if workload.checkpointed:
            model.enable_input_require_grads()
    return model.train()


def build(name: str) -> PreTrainedModel:
    """A new model in bf16 and train mode on the GPU, if there is one; random weights of seed 0.

    Head and embedding are tied where that is the type's default; attention is SDPA.
    """
    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**sizes, use_cache=False)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    return model.train()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
