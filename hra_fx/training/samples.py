"""Samples of a user as calls of a model without padding: batches, rows of a tokenized dataset, or texts."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.compat import pytree
from hra_fx.errors import AdapterError
from hra_fx.example_inputs import Call, normalize_inputs

_MASK, _DECODER = "attention_mask", "decoder_attention_mask"


def calls_of(model: nn.Module, samples: Any, tokenizer: Any = None) -> Iterator[Call]:
    """The calls of a model for `samples`, without padding. `tokenizer` is for samples that are texts.

    A sample is a batch (a mapping of keyword arguments, a tuple or list of positional ones, or a tensor), a row of a
    tokenized dataset (a mapping with lists, or with one-dimensional `input_ids`), or a text.

    Raises:
        AdapterError: samples of another kind, texts without a tokenizer, or padding that cannot be taken out.
    """
    is_iterable = hasattr(samples, "__iter__") or hasattr(samples, "__getitem__")
    if not is_iterable or isinstance(samples, (str, Mapping, Tensor)):
        raise AdapterError(f"`samples` must be an iterable of batches, such as a list, got {type(samples).__name__}.")
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    parameters = inspect.signature(model.forward).parameters.values()
    names = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    are_named = not any(one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL) for one in parameters)
    for sample in samples:
        given = _tokens(sample, tokenizer) if isinstance(sample, str) else sample
        args, kwargs = pytree.tree_map(_as_tensor, normalize_inputs(given, "a sample"))
        if _is_row(kwargs):
            kwargs = _batch_of_one(kwargs, names)
        elif are_named:  # without labels, such as those of (images, labels)
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
        if "input_ids" in kwargs and not kwargs["input_ids"].numel():
            continue  # an empty text
        for batch in _without_padding(kwargs, decodes):
            yield args, batch


def _as_tensor(value: Any) -> Any:
    """An array of numpy as a tensor, if its values are numbers; other values as they are."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return torch.as_tensor(value) if kind in ("b", "i", "u", "f") else value


def _tokens(text: str, tokenizer: Any) -> dict[str, Any]:
    if tokenizer is None:
        raise AdapterError("`samples` contains texts, so pass tokenizer=, the tokenizer of the model.")
    return {name: list(ids) for name, ids in tokenizer(text, truncation=True).items()}


def _is_row(sample: Mapping[str, Any]) -> bool:
    """Whether a mapping is a row of a tokenized dataset, and not a batch."""
    if (ids := sample.get("input_ids")) is not None:
        return isinstance(ids, (list, tuple)) or ids.ndim == 1
    kinds = {list if isinstance(value, list) else type(value) for value in sample.values()}
    return list in kinds and Tensor not in kinds


def _batch_of_one(row: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A row as a batch, without columns that are not numbers or that the model does not take."""
    batch: dict[str, Any] = {}
    for name, value in row.items():
        with suppress(TypeError, ValueError, RuntimeError):  # texts, None, and lists of them
            if (tensor := torch.as_tensor(value)).dim():
                batch[name] = tensor[None]
    if not batch:
        raise AdapterError(
            f"a row of `samples` has no lists of numbers, only {', '.join(row)}. Tokenize it first; chats with "
            "tokenizer.apply_chat_template(messages, return_dict=True)."
        )
    ids = batch.get("input_ids")
    if ids is not None and ids.dim() != 2:
        raise AdapterError(
            f"`input_ids` of a row must be one list of tokens, got shape {tuple(ids.shape[1:])}. Pass rows one by one, "
            "or batches with tensors."
        )
    return {name: value for name, value in batch.items() if name in names} or batch


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
        if any(leaf is not value or len(leaf) != count for leaf in tensors):
            raise AdapterError(
                f"{name}: the batch has padding (`attention_mask`), and this is not a tensor with {count} rows. Pass "
                "one sample per batch, without padding."
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
