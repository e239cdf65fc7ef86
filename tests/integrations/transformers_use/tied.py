"""Tiny models of transformers whose output layer is tied to the embeddings, each in its own way."""

from __future__ import annotations

from typing import Any, NamedTuple

import tiny
import torch
from torch import Tensor

SMALL = tiny.SMALL | {"vocab_size": 32}
VOCABULARY = SMALL["vocab_size"]


class Case(NamedTuple):
    """A model in float64, the path of its output layer, what that is tied to, and a target inside."""

    model: Any
    head: str
    embedding: str
    inside: str


def llama() -> Case:
    model = tiny.llama(**SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True})
    return Case(model, "lm_head", "model.embed_tokens", "q_proj")


def t5() -> Case:
    return Case(tiny.t5(vocab_size=VOCABULARY), "lm_head", "shared", "q")


def bert() -> Case:
    model = tiny.bert("BertForMaskedLM", **SMALL)
    return Case(model, "cls.predictions.decoder", "bert.embeddings.word_embeddings", "query")


CASES = {"llama": llama, "t5": t5, "bert": bert}


def case(kind: str) -> Case:
    """A model in eval mode, whose biases are not zero."""
    torch.manual_seed(0)
    made = CASES[kind]()
    made.model.to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    assert made.model.get_submodule(made.head).weight is made.model.get_submodule(made.embedding).weight
    return made


def logits(model: Any) -> Tensor:
    tokens = torch.arange(3, 15).view(2, 6)
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    found: Tensor = model(**inputs).logits
    return found
