"""Mixtures of experts of transformers: two layers, four experts (or so), two of them for a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zoo.entry import Entry
from zoo.inputs import TEXT, hugging, padding, tokens, words

EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
#: DeepSeek's attention with low-rank queries, keys and values; its first layer is dense.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
}
GATED: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
#: One layer of each kind.
HYBRID: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
}
#: One layer whose attention looks at a chunk, one that looks at all.
LLAMA4: dict[str, Any] = {
    "intermediate_size_mlp": 32,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8,
    "max_position_embeddings": 32,
    "num_key_value_heads": 1,
}
DBRX: dict[str, Any] = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 32,
    "resid_pdrop": 0.1,
    "attn_config": {"kv_n_heads": 1, "attn_pdrop": 0.1, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
}
SWITCH: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
}


def _moe(name: str, model: str, **config: Any) -> Entry:
    """An entry of the usual sizes and experts, with those of `config` in place of them."""
    return Entry(f"transformers/{name}", hugging(model, **TEXT | EXPERTS | config), tokens())


ENTRIES: list[Entry] = [
    _moe("mixtral", "MixtralForCausalLM"),
    _moe("qwen2_moe", "Qwen2MoeForCausalLM"),
    _moe("qwen3_moe", "Qwen3MoeForCausalLM"),
    _moe("qwen3_next", "Qwen3NextForCausalLM", **GATED),
    _moe("olmoe", "OlmoeForCausalLM"),
    _moe("flex_olmo", "FlexOlmoForCausalLM"),
    _moe("deepseek_v2", "DeepseekV2ForCausalLM", **LATENT | {"topk_method": "greedy", "head_dim": 8}),
    _moe("deepseek_v3", "DeepseekV3ForCausalLM", **LATENT),
    _moe("glm4_moe", "Glm4MoeForCausalLM", n_routed_experts=4, first_k_dense_replace=1),
    _moe("granitemoe", "GraniteMoeForCausalLM"),
    _moe("granitemoeshared", "GraniteMoeSharedForCausalLM", shared_intermediate_size=16),
    _moe("phimoe", "PhimoeForCausalLM", hidden_dropout=0.1),
    _moe("gpt_oss", "GptOssForCausalLM", sliding_window=4, max_position_embeddings=None),
    _moe("llama4", "Llama4ForCausalLM", **LLAMA4),
    _moe("dbrx", "DbrxForCausalLM", **DBRX),
    _moe("jamba", "JambaForCausalLM", **HYBRID),
    _moe("jetmoe", "JetMoeForCausalLM", kv_channels=8),
    _moe("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    _moe("minimax", "MiniMaxForCausalLM", block_size=4, layer_types=["linear_attention", "full_attention"]),
    _moe("lfm2_moe", "Lfm2MoeForCausalLM", num_dense_layers=1, layer_types=["conv", "full_attention"]),
    Entry(
        "transformers/switch_transformers",
        hugging("SwitchTransformersForConditionalGeneration", **TEXT | SWITCH, decoder_start_token_id=0),
        tokens(decoder_input_ids=words, decoder_attention_mask=padding),
    ),
]

#: Models whose experts are adapted too.
_ADAPTED = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4")
ENTRIES += [
    replace(entry, name=f"{entry.name}_experts", parameters=("experts.gate_up_proj", "experts.down_proj"))
    for entry in ENTRIES
    if entry.name.partition("/")[2] in _ADAPTED
]
