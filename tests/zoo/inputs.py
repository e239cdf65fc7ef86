"""What the tables share: builders that import a library late, and the inputs that a model is called with.

Floats come from torch's generator, which the caller seeds; `size` picks the length or the side out of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from zoo.entry import Call

Inputs = Callable[[int, int], Call]

WORDS = 50
LENGTHS = (9, 12)
SIDES = (32, 48)

#: The sizes by the names that most configurations know; one that names a size otherwise ignores these.
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
#: The same for texts: special tokens within the vocabulary.
TEXT: dict[str, Any] = SMALL | {
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.1,
    "use_cache": False,
}
#: The same for encoder-decoders.
BOTH_SIDES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def hugging(model: str, **config: Any) -> Callable[[], nn.Module]:
    """Builder of a transformers model from the fields of its configuration, less those that are None."""

    def build() -> nn.Module:
        made: type[Any] = getattr(import_module("transformers"), model)
        # Copies, since configurations take from the dicts that they are given.
        fields = {field: deepcopy(value) for field, value in config.items() if value is not None}
        built: nn.Module = made(made.config_class(**fields))
        return built

    return build


def diffusing(model: str, **config: Any) -> Callable[[], nn.Module]:
    """Builder of a diffusers model from the arguments of its class."""

    def build() -> nn.Module:
        built: nn.Module = getattr(import_module("diffusers"), model)(**deepcopy(config))
        return built

    return build


def words(batch: int, length: int, vocabulary: int = WORDS) -> Tensor:
    """Token ids `(batch, length)` that are no special tokens."""
    return torch.randint(3, vocabulary, (batch, length))


def padding(batch: int, length: int) -> Tensor:
    """Attention mask `(batch, length)`; the first text is two tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def leading(batch: int, length: int) -> Tensor:
    """A mask `(batch, length)` that has the first token alone."""
    return (torch.arange(length) == 0).long().expand(batch, length)


def drawn(extra: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    """The inputs of a table: what is callable is made for this batch and length (or side), the rest is as it stands."""
    return {name: value(batch, length) if callable(value) else value for name, value in extra.items()}


def tokens(lengths: tuple[int, ...] = LENGTHS, *, masked: bool = True, **extra: Any) -> Inputs:
    """Inputs of a text model: `input_ids`, `attention_mask` where `masked`, and `extra`, tensors or makers of them."""

    def call(batch: int, size: int) -> Call:
        length = lengths[size]
        inputs: dict[str, Any] = {"input_ids": words(batch, length)}
        if masked:
            inputs["attention_mask"] = padding(batch, length)
        return (), inputs | drawn(extra, batch, length)

    return call


def images(sides: tuple[int, ...] = SIDES, channels: int = 3, **extra: Any) -> Inputs:
    """Inputs of an image model: `pixel_values` `(batch, channels, side, side)`, and `extra`, tensors or makers."""

    def call(batch: int, size: int) -> Call:
        side = sides[size]
        return (), {"pixel_values": torch.randn(batch, channels, side, side)} | drawn(extra, batch, side)

    return call
