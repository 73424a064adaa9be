"""A tiny random model of any architecture that transformers knows, to look at and to verify with.

    tiny_model("llama")   ->   LlamaForCausalLM: 4 layers, 64 wide, 4 heads on 2, vocabulary of 256

Every size of the type's default config that is larger than the one below is made that one;
switches, ratios and lists stay as the architecture has them, so that the model is of its kind.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from liger_fx.errors import UsageError, one_line

LAYERS = 4  # enough for most patterns of unlike layers to come round
_LARGEST = 50_000_000  # parameters; a model that stays larger has sizes that are spelled otherwise

# The spellings of a size in transformers' configs, after the size.
_SPELLINGS = (
    (64, "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size lru_width conv_dim"),
    (64, "attention_hidden_size hidden_dim"),
    (96, "intermediate_size n_inner d_ff ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
    (96, "dff intermediate_size_mlp block_ff_dim d_inner dim_ff"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (4, "encoder_attention_heads linear_num_value_heads linear_num_heads kda_num_heads"),
    (2, "num_key_value_heads num_kv_heads linear_num_key_heads num_global_key_value_heads"),
    (16, "head_dim d_kv v_head_dim qk_head_dim kv_lora_rank index_head_dim dim_head mamba_headdim"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim mamba_d_head"),
    (16, "global_head_dim kda_head_dim key_head_dim"),
    (16, "sliding_window sliding_window_size attention_window_size attention_chunk_size"),
    (24, "q_lora_rank"),
    (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim state_size ssm_state_size mamba_d_state"),
    (8, "mamba_n_heads mamba_num_heads chunk_size mamba_chunk_size laurel_rank"),
    (8, "hidden_size_per_layer_input"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts index_topk mamba_dt_rank"),
    (4, "time_step_rank prompt_types"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k index_n_heads"),
    (2, "altup_num_inputs n_mamba_heads prompt_length"),
    (1, "n_shared_experts num_shared_experts n_group topk_group n_groups mamba_n_groups"),
    (1, "mamba_ngroups first_k_dense_replace num_dense_layers num_mem_blocks zero_expert_num"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (32, "moe_shared_expert_intermediate_size moe_expert_ffn_hidden_size expert_ffn_hidden_size"),
    (128, "mamba_d_ssm"),
    (256, "vocab_size vocab_size_per_layer_input"),
    (512, "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
)
_SIZES = {name: size for size, names in _SPELLINGS for name in names.split()}
_LAYER_COUNTS = {name for name in _SIZES if name.endswith(("layers", "n_layer"))} - {
    "num_dense_layers"
}

_KINDS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_MAPPING,
)


def tiny_model(model_type: str, layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    """A float32 model on the CPU, in eval mode, of the type's language model class.

    Norm weights and biases are moved off their constant start: a rewrite that forgot one would
    otherwise not show. Raises UsageError when transformers knows no such type, or when the tiny
    config is one that the architecture cannot be built from.
    """
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{model_type!r} is no directory and no transformers model type.{hint}")
    torch.manual_seed(seed)
    try:
        config = _shrunk(CONFIG_MAPPING[model_type], layers)
        with torch.device("meta"):
            sketch = model_class(config)(config)
        if sketch.num_parameters() > _LARGEST:
            raise ValueError(f"it would have {sketch.num_parameters():,} parameters")
        model = type(sketch)(config)
    except Exception as error:  # an architecture may refuse a config in any way it likes
        raise UsageError(
            f"No tiny {model_type} can be made ({one_line(error)}): "
            "give a directory with a config.json instead."
        ) from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class for a config: causal language model if there is one, else the next best head.

    Raises UsageError when transformers has no model for it.
    """
    for kind in _KINDS:
        if type(config) in kind:
            found = kind[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    raise UsageError(f"transformers has no model class for a {type(config).__name__}.")


def _shrunk(config_class: Any, layers: int) -> Any:
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        size = layers if field.name in _LAYER_COUNTS else _SIZES.get(field.name)
        unset = field.default is None and field.name in ("head_dim", "num_key_value_heads")
        if unset or (size is not None and type(field.default) is int and field.default > size):
            sizes[field.name] = size
    for name, part in config_class.sub_configs.items():
        if dataclasses.is_dataclass(part):
            sizes[name] = _shrunk(part, layers)
    if "qk_rope_head_dim" in sizes and "num_key_value_heads" in sizes:
        # latent attention has one key head for each query head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return config_class(**sizes)
