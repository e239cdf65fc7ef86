"""Trained rows of an embedding (`trainable_token_indices`), without a copy of the embedding.

The child `<embedding>.hra_tokens` has the rows and their token indices. For the base model both are empty; those of an
adapter are trained copies of them (`Copies`), which are switched with it. An output layer that is tied to the embedding
reads the same rows. Code that reads the weight of either, as TRL's fused loss does, gets a copy with the rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.functional.householder import working_dtype
from hra_fx.layers.class_swap import SwapMixin, original_class
from hra_fx.layers.target import TOKENS
from hra_fx.layers.weight import is_parameter, weight_property

#: PEFT's names of the tensors.
ROWS = "trainable_tokens_delta"
INDICES = "token_indices"


class TokenRows(nn.Module):
    """The rows of one embedding that are in use, `(n, d)`, and their token indices, `(n,)`; empty in the base model."""

    token_indices: Tensor
    trainable_tokens_delta: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        """Create empty rows for an embedding with this weight."""
        super().__init__()
        rows = torch.empty(0, weight.shape[1], dtype=working_dtype(weight.dtype), device=weight.device)
        self.register_parameter(ROWS, nn.Parameter(rows, requires_grad=False))
        indices = torch.empty(0, dtype=torch.int64, device=weight.device)
        self.register_buffer(INDICES, indices, persistent=False)  # the configuration has them


class TrainedTokens(SwapMixin):
    """An embedding with trained rows, or an output layer that is tied to one."""

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Replace the outputs of trained tokens in the forward of `base`, and the property `weight`."""
        replaced = _looked_up if issubclass(base, nn.Embedding) else _projected

        @functools.wraps(base.forward)
        def forward(self: nn.Module, input: Tensor) -> Any:
            rows = token_rows(self)
            if rows is None or not len(rows.token_indices):
                return base.forward(self, input)
            return replaced(self, rows, input)

        return {"forward": forward, "weight": weight_property("weight", _weight)}


def token_rows(layer: nn.Module) -> TokenRows | None:
    """The rows that a layer reads: those of its own child, or of the embedding that it is tied to."""
    # A tied layer has the rows in a tuple, so that they do not become its child.
    own = layer._modules.get(TOKENS) or layer.__dict__.get(TOKENS, (None,))[0]
    return own if isinstance(own, TokenRows) else None


def plain_forward(layer: nn.Module) -> bool:
    """Whether a layer computes what `nn.Linear`, `nn.Embedding` or a scaled embedding does.

    An embedding with its own forward is called with a few tokens to find out.
    """
    own = original_class(layer)
    if own.forward in (nn.Embedding.forward, nn.Linear.forward):
        return True
    if not isinstance(layer, nn.Embedding) or not hasattr(layer, "embed_scale"):
        return False
    tokens = torch.arange(min(4, layer.num_embeddings), device=layer.weight.device)
    with torch.no_grad():
        return torch.equal(own.forward(layer, tokens), _scaled(layer, layer.weight[tokens]))


def _parameter(layer: nn.Module) -> Any:
    """The weight without trained rows. FSDP1 and DataParallel set a plain attribute."""
    held = layer.__dict__.get("weight")
    return nn.Module.__getattr__(layer, "weight") if held is None else held


def _weight(layer: nn.Module) -> Any:
    """The weight for code that reads it: with the trained rows while the model runs, and otherwise the parameter."""
    weight, rows = _parameter(layer), token_rows(layer)
    if rows is None or not len(rows.token_indices) or is_parameter(layer, weight):
        return weight
    return weight.index_copy(0, rows.token_indices, rows.trainable_tokens_delta.to(weight.dtype))


def _looked_up(self: Any, rows: TokenRows, input: Tensor) -> Tensor:
    """Replace the outputs of trained tokens. Embeddings with `max_norm` or `scale_grad_by_freq` are refused earlier."""
    found = input[..., None] == rows.token_indices  # (..., n); its argmax is the row of a token
    output = F.embedding(input, _parameter(self), self.padding_idx, sparse=self.sparse)
    values = F.embedding(found.byte().argmax(-1), rows.trainable_tokens_delta).to(output.dtype)
    return _scaled(self, torch.where(found.any(-1, keepdim=True), values, output))


def _projected(self: Any, rows: TokenRows, input: Tensor) -> Tensor:
    """Replace the logits of trained tokens. This needs a product with `n` rows, but no copy of the weight."""
    weight, indices = _parameter(self), rows.token_indices
    bias = None if self.bias is None else self.bias[indices]
    logits = F.linear(input, rows.trainable_tokens_delta.to(weight.dtype), bias)
    output = F.linear(input, weight, self.bias)
    return output.index_copy_(-1, indices, logits.to(output.dtype))


def _scaled(embedding: nn.Module, values: Tensor) -> Tensor:
    """Multiply rows by the factor of an embedding that scales its outputs, as in Gemma and BART."""
    if original_class(embedding).forward is nn.Embedding.forward:
        return values
    scale: Any = embedding.embed_scale
    return values * (scale.to(values.dtype) if isinstance(scale, Tensor) else scale)
