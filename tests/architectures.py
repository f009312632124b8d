"""Tiny models of the architectures of transformers, with fixed random weights, from shrunken configurations."""

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

VOCABULARY = 600
POSITIONS = 256
WINDOW = 64  # of attention
CHUNK = 16  # of other things that are shorter than a text: states, blocks, keys to choose from
# What the fields of a configuration become, where it has them.
SMALL: dict[str, Any] = {
    name: value
    for value, names in (
        (
            WINDOW,
            "sliding_window sliding_window_size window_size attention_chunk_size attention_window_size "
            "keep_window_size local_attention_window_len",
        ),
        (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
        (
            POSITIONS,
            "max_position_embeddings n_positions max_seq_len context_length n_ctx model_max_length "
            "original_max_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings",
        ),
        (
            32,
            "hidden_size d_model n_embd embedding_size attention_hidden_size lru_width emb_dim "
            "word_embed_proj_dim input_embedding_size output_embedding_size embedding_dim dim shared_head_dim "
            "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size ple_embed_dim "
            "router_hidden_size expert_ffn_size",
        ),
        (
            64,
            "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim d_inner d_ff dff dim_ff hidden_dim "
            "intermediate_size_mlp feed_forward_size ffn_hidden_size shared_expert_intermediate_size "
            "shared_intermediate_size dense_intermediate_size shared_experts_intermediate_size mamba_d_ssm",
        ),
        (
            2,
            "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
            "num_decoder_layers num_blocks n_encoder_layers num_key_value_heads num_kv_heads "
            "swa_num_key_value_heads linear_num_key_heads index_n_heads num_experts_per_tok num_experts_per_token "
            "moe_k moe_topk router_top_k eos_token_id forced_eos_token_id",
        ),
        (
            4,
            "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
            "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
            "swa_num_attention_heads linear_num_heads linear_num_value_heads num_experts n_routed_experts "
            "num_local_experts moe_num_experts rotary_dim",
        ),
        (
            8,
            "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim d_head d_kv dim_head kv_channels swa_head_dim "
            "index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim attention_head_size "
            "global_head_dim mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_head_dim "
            "mamba_headdim mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank",
        ),
        (
            CHUNK,
            "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank adapter_rank hidden_size_per_layer_input chunk_size "
            "mamba_chunk_size block_size local_attn_chunk_length lsh_attn_chunk_length index_topk "
            "index_block_size local_radius global_block_size num_global_blocks attention_window",
        ),
        (
            1,
            "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers index_topk_blocks "
            "bos_token_id decoder_start_token_id",
        ),
        (2 * WINDOW, "local_attention"),
        (0.3, "initializer_range init_std initializer_factor"),
        (0, "pad_token_id sep_token_id cls_token_id mask_token_id"),
    )
    for name in names.split()
}
# Fields that list a kind for each layer: all kinds once, and then in the other order.
PER_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "indexer_types", "attn_layers")


def small_config(model_type: str, *, is_causal: bool = False, **changes: Any) -> PreTrainedConfig:
    """Return a configuration for a model of about 100 kB; of the decoder alone, if causal."""
    kind, known = type(AutoConfig.for_model(model_type)), OVERRIDES.get(model_type, {})
    flags = {"is_decoder": True} if is_causal and model_type in DECODERS else {}
    if is_causal and model_type in HALVES:
        flags = {"is_decoder": True, "is_encoder_decoder": False}
    return shrink(kind, {**known, **flags, **changes})


def shrink(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(kind)}
    usual = kind()
    settings = {name: value for name, value in SMALL.items() if name in names}
    layers = {name: list(dict.fromkeys(value)) for name in PER_LAYER if (value := getattr(usual, name, None))}
    count = 2 * max([1, *map(len, layers.values())])
    for name, kinds in layers.items():
        if name in names:
            settings[name] = ([*kinds, *reversed(kinds)] * count)[:count]
    if count > 2:
        settings |= {name: count for name in ("num_hidden_layers", "num_layers") if name in names}
    for name, value in vars(usual).items():
        if isinstance(value, PreTrainedConfig) and name in names:
            settings[name] = shrink(type(value), changes.pop(name, {}))
    return kind(**{**settings, **changes})


def make_model(auto_class: Any, config: PreTrainedConfig, *, std: float | None = None) -> PreTrainedModel:
    """Return a model with random weights; matrices are of that standard deviation, if given."""
    torch.manual_seed(0)
    model = auto_class.from_config(config).float().eval()
    for parameter in model.parameters():
        if std and parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=std)
    return model


# Encoders that may be decoders too, and models of which the decoder alone is a causal one.
DECODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "reformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
HALVES = [
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "trocr",
    "whisper",
]
LATENT = [
    "axk1",
    "axk2",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "youtu",
    "dots3_note_text",
    "dots1",
    "zamba",
    "zamba2",
]
MULTI_HEAD: dict[str, Any] = {"num_key_value_heads": 4}  # latent attention has a key for each head
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT, MULTI_HEAD),
    "dots1": {"n_shared_experts": 1, **MULTI_HEAD},
    "dots3_note": {"text_config": MULTI_HEAD},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "attention", "mamba"], "num_hidden_layers": 4},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        **MULTI_HEAD,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "llama4_text": {"num_hidden_layers": 4},
    "llama4": {"text_config": {"num_hidden_layers": 4}},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "fsmt": {"src_vocab_size": 600, "tgt_vocab_size": 600, "langs": ["en", "de"]},
    "bigbird_pegasus": {"num_random_blocks": 1},
    "big_bird": {"num_random_blocks": 1},
    "longformer": {"sep_token_id": 3},
    "mpt": {"use_cache": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "switch_transformers": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    },
    **{name: {"decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5", "longt5")},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 500,
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
}
