"""Samples of a user as calls of a model without padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.compat import pytree
from hra_fx.errors import AdapterError
from hra_fx.example_inputs import Call, normalize_inputs

_MASK, _DECODER = "attention_mask", "decoder_attention_mask"


def calls_of(model: nn.Module, samples: Any) -> Iterator[Call]:
    """The calls of a model for `samples`, without padding.

    A sample is a batch: a mapping of keyword arguments, a tuple or list of positional ones, or a tensor.

    Raises:
        AdapterError: samples of another kind, or padding that cannot be taken out.
    """
    is_iterable = hasattr(samples, "__iter__") or hasattr(samples, "__getitem__")
    if not is_iterable or isinstance(samples, (str, Mapping, Tensor)):
        raise AdapterError(f"`samples` must be an iterable of batches, such as a list, got {type(samples).__name__}.")
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    parameters = inspect.signature(model.forward).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    are_named = not any(one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL) for one in parameters)
    for sample in samples:
        args, kwargs = normalize_inputs(sample, "a sample")
        if are_named:  # without labels, such as those of (images, labels)
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
        ids = kwargs.get("input_ids")
        if ids is not None and getattr(ids, "ndim", 0) != 2:
            raise AdapterError(
                "`input_ids` of a sample must be a tensor of shape (batch, length). For texts, pass [tokenizer(text, "
                "return_tensors='pt') for text in texts]; for a dataset, a DataLoader with a collator."
            )
        for batch in _without_padding(kwargs, decodes):
            yield args, batch


def _without_padding(batch: dict[str, Any], decodes: bool) -> Iterator[dict[str, Any]]:
    """The rows of a batch, one by one, without the columns that its masks hide."""
    masks = {name: _is_token(name, batch[name]) for name in (_MASK, _DECODER) if isinstance(batch.get(name), Tensor)}
    labels: Any = batch.get("labels")
    if decodes and _DECODER not in masks and getattr(labels, "ndim", 0) == 2:
        masks[_DECODER] = (labels != -100).flip(1).cumsum(1).flip(1) > 0  # the decoder's inputs are made from them
    if all(bool(mask.all()) for mask in masks.values()):
        yield batch
        return
    count = len(next(iter(masks.values())))
    for name, value in batch.items():
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()]
        if (wrong := next((leaf for leaf in tensors if leaf is not value or len(leaf) != count), None)) is not None:
            raise AdapterError(
                f"{name}: the batch has padding (`attention_mask`), and the first dimension of this tensor is not the "
                f"number of rows: got shape {tuple(wrong.shape)} for {count} rows. Pass one sample per batch, without "
                "padding."
            )
    for row in range(count):
        if all(bool(mask[row].any()) for mask in masks.values()):
            yield {name: _row(value, row, masks.get(_side(name, masks))) for name, value in batch.items()}


def _is_token(name: str, mask: Tensor) -> Tensor:
    """The mask as booleans. Tokens must not have padding between them, which cannot be taken out."""
    starts = torch.nn.functional.pad(mask.int(), (1, 0)).diff(dim=-1) > 0
    if mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()) or bool((starts.sum(dim=1) > 1).any()):
        raise AdapterError(
            f"`{name}` must have shape (batch, length), with 1 for tokens and 0 for padding at the start or the end, "
            f"got shape {tuple(mask.shape)} or other values. Pass samples without padding and without it."
        )
    return mask != 0


def _side(name: str, masks: Mapping[str, Tensor]) -> str:
    """The mask of an argument: that of the decoder for its inputs and for labels."""
    return _DECODER if _DECODER in masks and (name.startswith("decoder_") or name == "labels") else _MASK


def _row(value: Any, row: int, mask: Tensor | None) -> Any:
    """One row of a tensor of a batch, without the columns that a mask hides."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    own = value[row : row + 1]
    return own if mask is None or value.shape[:2] != mask.shape else own[:, mask[row]]
