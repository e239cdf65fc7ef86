"""`nn.MultiheadAttention`: its out_proj is never called, and q, k and v are one parameter. Both weights are rotated."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from adapting import config
from layers.checking import assert_same, check, check_fold, normal, pair, run_dense
from refusals import refused
from torch import Tensor, nn


class Attending(nn.Module):
    """Self-attention, or attention to another sequence."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **kwargs)

    def forward(self, x: Tensor, memory: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        memory = x if memory is None else memory
        return self.attn(x, memory, memory, **kwargs)


X, MEMORY = normal(1, 5, 2, 12), normal(2, 7, 2, 12)
CAUSAL = torch.triu(torch.full((5, 5), float("-inf"), dtype=torch.float64), 1)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

CALLS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "self": ({}, (X,), {}),
    "cross": ({}, (X, MEMORY), {}),
    "no bias": ({"bias": False}, (X,), {}),
    "bias of k and v": ({"add_bias_kv": True}, (X, MEMORY), {}),
    "zero attention": ({"add_zero_attn": True}, (X,), {}),
    "causal": ({}, (X,), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "mask": ({}, (X,), {"attn_mask": normal(3, 5, 5)}),
    "mask of each head": ({}, (X,), {"attn_mask": normal(3, 6, 5, 5), "average_attn_weights": False}),
    "padding": ({}, (X,), {"key_padding_mask": PADDED}),
    "padding, batch first": (
        {"batch_first": True},
        (X.transpose(0, 1).contiguous(),),
        {"key_padding_mask": PADDED},
    ),
    "unbatched": ({}, (X[:, 0],), {}),
    "dropout": ({"dropout": 0.3}, (X,), {"need_weights": False}),
}


@pytest.mark.parametrize(("made", "args", "kwargs"), CALLS.values(), ids=CALLS)
def test_it_computes_with_the_rotated_weights(
    made: dict[str, Any], args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> None:
    base, model = pair(lambda: Attending(**made), ["attn", "out_proj"])
    check(base, model, *args, **kwargs)
    check_fold(base, model, *args, **kwargs)


@pytest.mark.parametrize("targets", [["attn"], ["out_proj"]])
def test_one_of_its_weights_alone(targets: list[str]) -> None:
    base, model = pair(Attending, targets)
    check(base, model, X, MEMORY)
    check_fold(base, model, X, MEMORY)


def test_inputs_of_different_widths_are_refused_for_the_attention_and_not_for_its_out_proj() -> None:
    model = nn.Sequential(nn.MultiheadAttention(12, 3, kdim=5, vdim=7))
    message = refused(model, config("0"))
    assert message.startswith("0 (MultiheadAttention): its `kdim` or `vdim` differs from `embed_dim`")
    assert message.endswith("Exclude the layer with `exclude_modules` and target its `out_proj`.")

    class Wide(Attending):
        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
            return self.attn(x, k, v)[0]

    base, adapted = pair(lambda: Wide(kdim=5, vdim=7), ["out_proj"])
    args = (X, normal(4, 6, 2, 5), normal(5, 6, 2, 7))
    check(base, adapted, *args)
    check_fold(base, adapted, *args)


# ---- torch's layers that contain it, and their fast paths in eval mode without gradients ----


def encoder(**kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not kwargs.get("norm_first"))


ENCODERS: dict[str, dict[str, Any]] = {"norm first": {"norm_first": True}, "gelu": {"activation": "gelu"}}
EVERY = ["self_attn", "out_proj", "linear1", "linear2"]
SEQUENCES = normal(6, 2, 5, 12)


@pytest.mark.parametrize("kwargs", ENCODERS.values(), ids=ENCODERS)
def test_transformer_encoder(kwargs: dict[str, Any]) -> None:
    base, model = pair(lambda: encoder(**kwargs), EVERY)
    check(base, model, SEQUENCES)
    check_fold(base, model, SEQUENCES)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", [*([each] for each in EVERY), EVERY], ids=[*EVERY, "every"])
def test_the_fast_path_over_nested_tensors(targets: list[str]) -> None:
    base, model = pair(encoder, targets)
    check(base, model, SEQUENCES)
    with torch.no_grad():
        slow = run_dense(base, model, SEQUENCES, src_key_padding_mask=PADDED)
        fast = model(SEQUENCES, src_key_padding_mask=PADDED)
    assert_same(fast[~PADDED], slow[~PADDED])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_same(model(SEQUENCES, src_key_padding_mask=PADDED)[~PADDED], slow[~PADDED])


def test_encoder_and_decoder() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True", UserWarning)
        base, model = pair(lambda: nn.Transformer(12, 2, 1, 1, 16), [*EVERY, "multihead_attn"])
    args = (normal(7, 3, 3, 12), normal(8, 3, 3, 12))
    check(base, model, *args)
    check_fold(base, model, *args)
