"""Tiny models of transformers with random weights, the same each time: `tiny.llama(num_hidden_layers=1)`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 64
#: By the names that most configurations know. Ten times the default range, so that the outputs of an untrained model
#: depend on its inputs.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
#: Smaller ones.
SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 37}


def made(kind: str, **fields: Any) -> Any:
    """A model of a class of transformers, from fields of its configuration."""
    torch.manual_seed(0)
    model: Any = getattr(transformers, kind)
    return model(model.config_class(**fields))


def bert(kind: str = "BertForSequenceClassification", **fields: Any) -> Any:
    """A model with dropout, whose training depends on the random numbers."""
    return made(kind, **TEXT | {"max_position_embeddings": 32} | fields)


def llama(kind: str = "LlamaForCausalLM", **fields: Any) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return made(kind, **TEXT | heads | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | fields)


def mixtral(**fields: Any) -> Any:
    return made("MixtralForCausalLM", **TEXT | {"num_key_value_heads": 2, "num_local_experts": 3} | fields)


def opt(**fields: Any) -> Any:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "init_std": 0.2}
    return made("OPTForCausalLM", **TEXT | sizes | fields)


def gpt2(**fields: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1}
    return made("GPT2LMHeadModel", **{"vocab_size": VOCABULARY, "initializer_range": 0.2} | sizes | fields)


def vit(**fields: Any) -> Any:
    return made("ViTForImageClassification", **TEXT | {"image_size": 32, "patch_size": 8} | fields)


def t5(kind: str = "T5ForConditionalGeneration", **fields: Any) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 37}
    return made(kind, **sizes | {"decoder_start_token_id": 0} | fields)


def untied_t5() -> Any:
    """One that does not repeat its input, as a new T5 does, because its embedding dominates."""
    tokens = {"decoder_start_token_id": 2, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False}
    model = t5(d_model=32, d_ff=64, num_heads=4, vocab_size=VOCABULARY, **tokens)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        model.shared.weight.mul_(0.1)
    return model
