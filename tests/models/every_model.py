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

# How large the fields of a config become, by name.
_SIZES: dict[float, str] = {
    300: "vocab_size n_vocab vocab_size_per_layer_input",
    256: "n_positions n_ctx max_position_embeddings max_sequence_length max_seq_len context_length",
    48: """intermediate_size ffn_dim d_ff n_inner dim_ff inner_dim encoder_ffn_dim decoder_ffn_dim
        moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp ffn_hidden_size
        shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size mlp_dim
        dense_intermediate_size""",
    32: """hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim word_embedding_size input_size
        lru_width hidden_dim dim_model""",
    16: "kv_lora_rank q_lora_rank lora_rank image_size patch_size",
    8: """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim global_head_dim kv_channels
        rotary_dim attention_head_size mamba_head_dim mamba_d_head qk_head_dim swa_head_dim swa_v_head_dim
        linear_key_head_dim linear_value_head_dim index_head_dim hidden_size_per_layer_input""",
    5: "sliding_window sliding_window_size window_size local_attention attention_window_size",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts ffn_num_experts""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers
        num_decoder_layers num_key_value_heads n_head_kv num_kv_heads kv_n_heads swa_num_key_value_heads
        attention_num_key_value_heads num_experts_per_tok top_k moe_topk moe_top_k num_experts_per_token top_k_experts
        pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id decoder_start_token_id""",
    1: """n_group topk_group num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace
        moe_layer_start_index num_dense_layers""",
    0: "num_kv_shared_layers num_nextn_predict_layers num_mtp_modules",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}

_LATENT = {"num_key_value_heads": 4, "head_dim": 8, "v_head_dim": 12}
_THREE_KINDS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
# What a rule by names gets wrong.
_OWN = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v", "glm4v_moe"), _THREE_KINDS),
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron")},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
}


def tiny_fields(config):
    """The fields of a config that make a small model, those of the configs inside it too."""
    fields = {}
    for name, value in config.to_dict().items():
        try:
            inner = getattr(config, name, None)
        except Exception:  # transformers' error of a field that differs from layer to layer
            continue
        if isinstance(inner, transformers.PretrainedConfig):
            fields[name] = tiny_fields(inner)
            continue
        if isinstance(value, bool) or (not isinstance(value, int | float) and value is not None):
            continue
        if re.fullmatch(r".*(drop|dropout|pdrop|dropout_prob|layerdrop)", name) and value is not None:
            fields[name] = 0.0
        elif name in _SIZE_OF and (value is not None or name == "pad_token_id"):
            fields[name] = _SIZE_OF[name]
    return fields


def tiny(model_type, dtype=torch.float32, seed=0, **more):
    """A small random model of a type, in training mode."""
    kind = type(AutoConfig.for_model(model_type))
    fields, own = tiny_fields(kind()), {**_OWN.get(model_type, {}), **more}
    fields.get("text_config", fields).update(own)
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
