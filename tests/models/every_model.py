"""Tiny random models of every causal language model class of transformers, built from nothing but their configs."""

import re

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

# How large a field of a config becomes, by its name; the first expression that matches counts.
_SIZES = [
    (r"vocab_size|n_vocab", 300),
    (r"(n_positions|n_ctx|max_position_embeddings|max_sequence_length|max_seq_len|context_length)", 256),
    (r"(pad|bos|eos|sep|cls)_token_id|decoder_start_token_id", 2),
    (r".*(n_group|topk_group)", 1),
    (r"(num_experts_per_tok|top_k|moe_top_?k|num_experts_per_token|moe_topk|top_k_experts)", 2),
    (r"(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|ffn_num_experts)", 4),
    (r"(first_k_dense_replace|moe_layer_start_index|num_dense_layers)", 1),
    (r"(num_kv_shared_layers|num_nextn_predict_layers|num_mtp_modules)", 0),
    (r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_encoder_layers|num_decoder_layers)", 2),
    (r"(num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads|swa_num_key_value_heads|attention_num_key_value_heads)", 2),
    (r"(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|swa_num_attention_heads)", 4),
    (r"(head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|attention_head_dim|global_head_dim|kv_channels|rotary_dim|attention_head_size|mamba_head_dim|mamba_d_head|qk_head_dim|swa_head_dim|swa_v_head_dim|linear_key_head_dim|linear_value_head_dim|index_head_dim)", 8),
    (r"(kv_lora_rank|q_lora_rank|lora_rank)", 16),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|word_embedding_size|input_size|lru_width|hidden_dim|dim_model)", 32),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|dim_ff|inner_dim|encoder_ffn_dim|decoder_ffn_dim|moe_intermediate_size|shared_expert_intermediate_size|intermediate_size_mlp|ffn_hidden_size|shared_intermediate_size|moe_shared_expert_intermediate_size|expert_ffn_hidden_size|mlp_dim|dense_intermediate_size)", 48),
    (r"(sliding_window|sliding_window_size|window_size|local_attention|attention_window_size)", 5),
    (r".*(drop|dropout|pdrop|dropout_prob|layerdrop)", 0.0),
    (r"(image_size|patch_size)", 16),
    (r"(vocab_size_per_layer_input)", 300),
    (r"(hidden_size_per_layer_input)", 8),
]  # fmt: skip


# What a rule by names gets wrong.
_OWN = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "longcat_flash"),
        {"num_key_value_heads": 4, "head_dim": 8, "v_head_dim": 12},
    ),
    "longcat_flash": {"num_attention_heads": 4, "head_dim": 8, "zero_expert_num": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
}


def tiny_fields(config):
    """The fields of a config that make a small model, those of the configs inside it too."""
    fields = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PretrainedConfig):
            fields[name] = tiny_fields(inner)
            continue
        if isinstance(value, bool) or (not isinstance(value, int | float) and value is not None):
            continue
        for expression, size in _SIZES:
            if re.fullmatch(expression, name):
                if value is not None or name in ("pad_token_id",):
                    fields[name] = size
                break
    return fields


def tiny(model_type, dtype=torch.float32, seed=0, **more):
    """A small random model of a type, in training mode."""
    kind = type(AutoConfig.for_model(model_type))
    fields = {**tiny_fields(kind()), **_OWN.get(model_type, {}), **more}
    config = kind(**fields)
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "is_decoder"):
        config.is_decoder, config.is_encoder_decoder = True, False
    auto = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"{model_type} has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = auto.from_config(config, dtype=dtype)
        for parameter in lm.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.1)
    if dtype == torch.float64 and hasattr(lm, "set_experts_implementation"):
        lm.set_experts_implementation("eager")  # torch's grouped product has no float64
    return lm.train()
