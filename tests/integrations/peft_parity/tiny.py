"""Tiny models of transformers with random weights, for task types, default targets and the trainable line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 37}


def bert(kind: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = transformers.BertConfig(**SMALL, max_position_embeddings=16, **({"num_labels": 3} | fields))
        return getattr(transformers, kind)(config)

    return build


def llama(kind: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, num_labels=3, pad_token_id=0, **fields)
        return getattr(transformers, kind)(config)

    return build


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 37}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": bert("BertModel"),
    "bert, classes": bert("BertForSequenceClassification"),
    "bert, tokens": bert("BertForTokenClassification"),
    "bert, answers": bert("BertForQuestionAnswering", num_labels=2),
    "llama": llama("LlamaForCausalLM"),
    "llama, classes": llama("LlamaForSequenceClassification"),
    "t5": t5,
}


def tiny(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model with the same random weights each time, in eval mode, with norms and biases that are not the start's."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :5]} if hasattr(model, "decoder") or "T5" in type(model).__name__ else {}
    return {"input_ids": ids, **more}
