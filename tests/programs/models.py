"""Tiny models of the kinds that tests/support/families.py does not have, and inputs for them.

model = tiny("t5"); model(**tiny_inputs(model, labels=True)).loss
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

from tests.programs.support import perturb
from tests.support.families import FAMILIES, build

VOCAB = 96
IMAGE = 90  # the token that stands for a piece of an image
WIDTH = 32

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = IDS | {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = DECODER | {"num_key_value_heads": 2}
BART = IDS | {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _text(kind: str, **more: Any) -> Any:
    return t.AutoConfig.for_model(kind, **(GROUPED | {"head_dim": 8} | more))


def _gpt2() -> Any:
    config = t.GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=WIDTH, n_layer=2, n_head=4, **IDS
    )
    return t.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = t.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return t.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = t.WhisperConfig(
        **(BART | {"max_source_positions": 20, "max_target_positions": 64}),
        num_mel_bins=8,
        begin_suppress_tokens=None,
    )
    return t.WhisperForConditionalGeneration(config)


def _moonshine() -> Any:
    config = t.MoonshineConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=128,
        **IDS,
    )
    return t.MoonshineForConditionalGeneration(config)


def _wav2vec2() -> Any:
    config = t.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        final_dropout=0.0,
    )
    return t.Wav2Vec2ForCTC(config)


def _qwen2_vl() -> Any:
    config = t.Qwen2VLConfig(
        text_config=GROUPED | {"rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    return t.Qwen2VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    config = t.Qwen3VLConfig(
        text_config=GROUPED | {"head_dim": 8, "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    return t.Qwen3VLForConditionalGeneration(config)


def _llava() -> Any:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=_text("llama"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    return t.LlavaForConditionalGeneration(config)


def _pixtral() -> Any:
    """Pixtral is a vision tower in a Llava."""
    config = t.LlavaConfig(
        vision_config=t.PixtralVisionConfig(**VISION),
        text_config=_text("mistral"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return t.LlavaForConditionalGeneration(config)


def _gemma3() -> Any:
    config = t.Gemma3Config(
        text_config=_text("gemma3_text", sliding_window=7, query_pre_attn_scalar=8),
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    )
    return t.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    config = t.PaliGemmaConfig(
        text_config=_text("gemma"),
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return t.PaliGemmaForConditionalGeneration(config)


def _idefics3() -> Any:
    config = t.Idefics3Config(
        text_config=_text("llama"), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    return t.Idefics3ForConditionalGeneration(config)


def _internvl() -> Any:
    vision = VISION | {"image_size": (16, 16), "patch_size": (4, 4)}
    config = t.InternVLConfig(
        text_config=_text("qwen2"),
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return t.InternVLForConditionalGeneration(config)


def _bart_like(kind: str) -> Any:
    config = t.AutoConfig.for_model(kind, **BART)
    return t.AutoModelForSeq2SeqLM.from_config(config)


def _decoder(kind: str, **more: Any) -> Any:
    return t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(kind, **(DECODER | more)))


BUILDERS: dict[str, Any] = {
    "gpt2": _gpt2,
    "gpt_neox": lambda: _decoder("gpt_neox"),
    "opt": lambda: _decoder("opt", ffn_dim=48, word_embed_proj_dim=WIDTH),
    "phi": lambda: _decoder("phi", num_key_value_heads=4),
    "stablelm": lambda: _decoder("stablelm", num_key_value_heads=2),
    "t5": _t5,
    "bart": lambda: _bart_like("bart"),
    "mbart": lambda: _bart_like("mbart"),
    "marian": lambda: _bart_like("marian"),
    "m2m_100": lambda: _bart_like("m2m_100"),
    "whisper": _whisper,
    "moonshine": _moonshine,
    "wav2vec2": _wav2vec2,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "pixtral": _pixtral,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "idefics3": _idefics3,
    "internvl": _internvl,
}
VISION_LANGUAGE = (
    "qwen2_vl",
    "qwen3_vl",
    "llava",
    "gemma3",
    "pixtral",
    "idefics3",
    "internvl",
    "paligemma",
)
SPEECH = ("whisper", "wav2vec2", "moonshine")
ENCODER_DECODER = ("t5", "bart", "mbart", "marian", "m2m_100", "whisper", "moonshine")


def tiny(name: str, seed: int = 0) -> Any:
    """A tiny float32 model in eval mode with tame random weights, the same for the same seed."""
    if name in FAMILIES:
        return build(name, seed=seed)
    torch.manual_seed(seed)
    return perturb(BUILDERS[name](), seed)


def _ids(batch: int, length: int, seed: int, upto: int = IMAGE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, upto, (batch, length), generator=generator)


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_inputs(model: Any, labels: bool = False, seed: int = 0) -> dict[str, Any]:
    """Inputs as the model's processor would make them: text, sound, or text with images."""
    kind = model.config.model_type
    if kind == "llava":
        kind = "pixtral" if model.config.vision_config.model_type == "pixtral" else "llava"
    if kind in VISION_LANGUAGE:
        inputs = _with_images(kind, seed)
        target = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    elif kind == "wav2vec2":
        inputs = {"input_values": _noise(2, 800, seed=seed)}
        target = _ids(2, 5, seed, upto=30)
    elif kind in ENCODER_DECODER:
        if kind == "whisper":
            inputs = {"input_features": _noise(2, 8, 40, seed=seed)}
        elif kind == "moonshine":
            inputs = {"input_values": _noise(2, 4000, seed=seed)}
        else:
            mask = torch.ones(2, 9, dtype=torch.long)
            mask[1, 6:] = 0
            inputs = {
                "input_ids": _ids(2, 9, seed).masked_fill(mask == 0, 0),
                "attention_mask": mask,
            }
        target = _ids(2, 6, seed + 1)
        if not labels:
            inputs["decoder_input_ids"] = target
    else:
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 6:] = 0
        inputs = {"input_ids": _ids(2, 9, seed).masked_fill(mask == 0, 0), "attention_mask": mask}
        target = inputs["input_ids"].masked_fill(mask == 0, -100)
    return inputs | ({"labels": target} if labels else {})


# How many image tokens one image of 16 x 16 becomes.
_PIECES = {"llava": 16, "pixtral": 16, "gemma3": 4, "paligemma": 16, "idefics3": 4, "internvl": 4}


def _with_images(kind: str, seed: int) -> dict[str, Any]:
    pieces = _PIECES.get(kind, 4)
    ids = _ids(2, pieces + 8, seed)
    ids[:, 3 : 3 + pieces] = IMAGE
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("qwen2_vl", "qwen3_vl"):
        ids[:, 2] = IMAGE + 2
        inputs["pixel_values"] = _noise(2 * 16, 3 * 2 * 4 * 4, seed=seed)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    elif kind == "idefics3":
        inputs["pixel_values"] = _noise(2, 1, 3, 16, 16, seed=seed)
    else:
        inputs["pixel_values"] = _noise(2, 3, 16, 16, seed=seed)
    if kind == "pixtral":
        inputs["image_sizes"] = torch.tensor([[16, 16]] * 2)
    if kind in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs
