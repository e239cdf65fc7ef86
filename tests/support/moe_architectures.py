"""Every architecture of transformers with experts, from its own registries, tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

#: Registries of models that take token ids. A model type that is in several is built from the first.
_REGISTRIES = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION")
#: Multimodal models that do not run on tokens alone, need other packages or have no small size. Their text model is an
#: architecture of its own.
_TEXT_MODELS = {
    "dots3_note": "dots3_note_text",
    "inkling_mm_model": "inkling_text",
    "llama4": "llama4_text",
    "nemo_speechlm": "nemotron_h",
    "nemotron_h_omni": "nemotron_h",
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: Sizes by the names that configurations have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "first_k_dense_replace", "topk_group"), 1),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(
        ("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads", "n_group", "num_expert_group"), 2
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "index_head_dim"), 8),
    **dict.fromkeys(("hidden_size", "d_model", "text_hidden_size", "out_hidden_size", "qk_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 16),
    **dict.fromkeys(("intermediate_size", "d_ff", "max_position_embeddings"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "enable_moe_block": True,
}
#: What single configurations need besides.
_FIELDS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"head_dim": 16, "index_head_dim": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
    },
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0},
    "hy_v4_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "mistral4": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
    },
    "muse_spark_audio": {"patch_sizes": (16, 6), "hidden_sizes": (16, 16), "depths": (1, 1)},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "linear_attention"]},
    "step3p5": {"sliding_window": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def architecture(kind: str) -> type[nn.Module]:
    """The class of a model type of language models."""
    made: type[nn.Module] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    return made


def architectures() -> dict[str, type[nn.Module]]:
    """Model type -> class, for all whose configuration names experts."""
    found: dict[str, type[nn.Module]] = {}
    for registry in _REGISTRIES:
        classes = getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING")
        for kind in getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING_NAMES"):
            if kind not in found | _TEXT_MODELS and _names_experts(_default(kind)):
                made = classes[CONFIG_MAPPING[kind]]
                found[kind] = made[0] if isinstance(made, tuple) else made
    assert {*_TEXT_MODELS.values()} <= found.keys()
    return found


def tiny(kind: str, model: type[nn.Module]) -> nn.Module:
    """A model of an architecture, of two layers and four experts, in eval mode, with weights of the usual size."""
    torch.manual_seed(0)
    built = model(CONFIG_MAPPING[kind](**_fields(CONFIG_MAPPING[kind]())))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return built.eval()


def experts_of(model: nn.Module) -> list[str]:
    """The names of the 3-D parameters of experts."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and "Experts" in type(module).__name__
    ]


def _default(kind: str) -> Any:
    try:
        return CONFIG_MAPPING[kind]()
    except Exception:  # its defaults are not valid
        return None


def _names_experts(config: Any) -> bool:
    return config is not None and any(
        _names_experts(value) if hasattr(value, "to_dict") else "experts" in name and "implementation" not in name
        for name, value in vars(config).items()
    )


def _fields(default: Any) -> dict[str, Any]:
    """The arguments of a configuration for a tiny model; `default`: the configuration without any."""
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if hasattr(value, "to_dict"):
            found[name] = _fields(type(value)())
        elif isinstance(value, list) and name.endswith("layer_types"):
            found[name] = (list(dict.fromkeys(value)) * 2)[:2]
        elif name in _SIZES:
            found[name] = _SIZES[name]
    return found | _FIELDS.get(default.model_type, {})
