"""Default `target_modules` by `model.config.model_type`, copied from PEFT 0.21.

Values are written like `HRAConfig.target_modules`: a tuple of names, or a regular expression for the full path.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DEFAULT_TARGETS"]

_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    "RefinedWeb": _FUSED,
    "RefinedWebModel": _FUSED,
    "bart": _QV,
    "bert": _QUERY_VALUE,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": _FUSED,
    "btlm": ("c_proj", "c_attn"),
    "chatglm": _FUSED,
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": _QUERY_VALUE,
    "falcon": _FUSED,
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3_text": _QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _QV,
    "gpt_neox": _FUSED,
    "gptj": _QV,
    "layoutlm": _QUERY_VALUE,
    "llama": _QV,
    "llama4": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _QV,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": _QV,
    "qwen3": _QV,
    "roberta": _QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "stablelm": _QV,
    "t5": ("q", "v"),
    "xlm-roberta": _QUERY_VALUE,
}
