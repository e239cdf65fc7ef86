"""Calls that differ from an example: other values, masks, kinds of inputs, and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hra_fx.compat import pytree
from hra_fx.example_inputs import Call

#: For each size that may change: (index of the flat input, dimension) of all inputs with this size.
Sizes: TypeAlias = Sequence[Sequence[tuple[int, int]]]


def tensors_of(call: Call) -> dict[int, Tensor]:
    """The tensors of a call, by the index of the flat input."""
    return {index: leaf for index, leaf in enumerate(pytree.tree_leaves(call)) if isinstance(leaf, Tensor)}


def _replaced(call: Call, values: Mapping[int, Tensor | None]) -> Call:
    leaves, spec = pytree.tree_flatten(call)
    made: Call = pytree.tree_unflatten([values.get(index, leaf) for index, leaf in enumerate(leaves)], spec)
    return made


def _is_mask(value: Tensor) -> bool:
    return value.dim() > 1 and (value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all() and value.any()))


def with_other_values(call: Call) -> Iterator[Call]:
    """Calls with other numbers, indices in another order, and in most of them other masks."""
    for by_rows in (False, True):  # a model may need the same number of end tokens in each row
        yield _replaced(call, {index: _other_value(value, by_rows) for index, value in tensors_of(call).items()})
    yield _replaced(call, {index: _other_value(x, True) for index, x in tensors_of(call).items() if not _is_mask(x)})


def _other_value(value: Tensor, by_rows: bool) -> Tensor:
    if _is_mask(value):  # the first third of a row is padding
        value = value.clone()
        first = value[0, ..., : max(1, value.shape[-1] // 3)]
        first.copy_(~first if value.dtype is torch.bool else torch.zeros_like(first))
        return value
    if value.is_floating_point() or value.is_complex():
        return value.flip(tuple(range(value.dim()))) * 0.9
    return value.roll(1, 0) if by_rows and value.dim() else value.flatten().roll(1).view(value.shape)


def variants(call: Call, other: Call, sizes: Sizes | None) -> Iterator[tuple[frozenset[int], Call]]:
    """Calls in other sizes, with the indices of the sizes that are 1. Without `sizes`, also other kinds of inputs."""
    if sizes is None:
        for index, value in tensors_of(call).items():
            yield frozenset(), _replaced(call, {index: None})
            if _is_mask(value):
                yield (
                    frozenset(),
                    _replaced(call, {index: value.float() if value.dtype is torch.bool else value.bool()}),
                )
    yield from _with_other_sizes(other, _equal_sizes(call) if sizes is None else sizes)


def _equal_sizes(call: Call) -> Sizes:
    found: dict[int, list[tuple[int, int]]] = {}
    for index, value in tensors_of(call).items():
        for dimension, size in enumerate(value.shape):
            found.setdefault(size, []).append((index, dimension))
    return list(found.values())


def _with_other_sizes(call: Call, sizes: Sizes) -> Iterator[tuple[frozenset[int], Call]]:
    # torch.export assumes that a size is at least 2, and drops what follows: so 1 beside the smallest others.
    every = range(len(sizes))
    for index in every:
        yield frozenset([index]), _resized(call, sizes, {index: 1})
        if len(sizes) > 1:
            yield frozenset([index]), _resized(call, sizes, {**dict.fromkeys(every, 2), index: 1})
    if len(sizes) > 1:
        yield frozenset(every), _resized(call, sizes, dict.fromkeys(every, 1))
    largest = max(
        (tensors_of(call)[index].shape[dimension] for places in sizes for index, dimension in places), default=0
    )
    for size in range(2, min(largest, 4)):
        yield frozenset(), _resized(call, sizes, dict.fromkeys(every, size))
    yield frozenset(), _resized(call, sizes, dict.fromkeys(every, -1))


def _resized(call: Call, sizes: Sizes, wanted: Mapping[int, int]) -> Call:
    """The call with the first items of some sizes; for -1, with its first item again at the end."""
    tensors = tensors_of(call)
    for which, size in wanted.items():
        for index, dimension in sizes[which]:
            x = tensors[index]
            part = x.narrow(dimension, 0, min(abs(size), x.shape[dimension]))
            tensors[index] = torch.cat([x, part], dimension) if size < 0 else part
    return _replaced(call, tensors)
