"""Calls that differ from an example: other values, masks, kinds of inputs, strides and sizes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hra_fx.compat import pytree
from hra_fx.example_inputs import Call

#: For each size that may change: (index of the flat input, dimension) of all inputs with this size.
Sizes: TypeAlias = Sequence[Sequence[tuple[int, int]]]


def _tensors_of(call: Call) -> dict[int, Tensor]:
    """The tensors of a call, by the index of the flat input."""
    return {index: leaf for index, leaf in enumerate(pytree.tree_leaves(call)) if isinstance(leaf, Tensor)}


def _replaced(call: Call, values: Mapping[int, Any]) -> Call:
    leaves, spec = pytree.tree_flatten(call)
    made: Call = pytree.tree_unflatten([values.get(index, leaf) for index, leaf in enumerate(leaves)], spec)
    return made


def _is_mask(value: Tensor) -> bool:
    return value.dim() > 1 and (value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all() and value.any()))


def with_other_values(call: Call) -> Iterator[Call]:
    """Calls with other numbers, indices in another order, and in most of them other masks."""
    tensors = _tensors_of(call)
    for by_rows in (False, True):  # a model may need the same number of end tokens in each row
        yield _replaced(call, {index: _other_value(index, value, by_rows) for index, value in tensors.items()})
    yield _replaced(call, {index: _other_value(index, x, True) for index, x in tensors.items() if not _is_mask(x)})


def _other_value(index: int, value: Tensor, by_rows: bool) -> Tensor:
    if _is_mask(value):  # the first third of a row is padding
        value = value.clone()
        first = value[0, ..., : max(1, value.shape[-1] // 3)]
        first.copy_(~first if value.dtype is torch.bool else torch.zeros_like(first))
        return value
    if value.is_floating_point() or value.is_complex():
        return value.flip(tuple(range(value.dim()))) * 0.9 ** (index + 1)  # makes equal inputs different
    return value.roll(1, 0) if by_rows and value.dim() else value.flatten().roll(1).view(value.shape)


def of_other_kinds(call: Call) -> Iterator[Call]:
    """Calls with `None`, a number, or a mask of another kind in the place of a tensor."""
    for index, value in _tensors_of(call).items():
        yield _replaced(call, {index: None})
        if value.numel() == 1:
            yield _replaced(call, {index: value.item()})
        if _is_mask(value):
            yield _replaced(call, {index: value.float() if value.dtype is torch.bool else value.bool()})


def with_one_object(call: Call) -> Iterator[Call]:
    """The call with one tensor in all places of its shape and dtype, if there are several: a forward may ask for it."""
    tensors, first = _tensors_of(call), dict[Any, Tensor]()
    made = {index: first.setdefault((x.shape, x.dtype, x.device), x) for index, x in tensors.items()}
    if len(first) < len(tensors):
        yield _replaced(call, made)


def with_other_order(call: Call) -> Iterator[Call]:
    """The call with the keys of its dictionaries in reverse order, if it has dictionaries."""
    args, kwargs = call
    if any(isinstance(value, dict) for value in (*args, *kwargs.values())):
        yield tuple(map(reversed_keys, args)), {name: reversed_keys(value) for name, value in kwargs.items()}


def reversed_keys(value: Any) -> Any:
    """A dictionary with its keys in reverse order; any other value as it is."""
    return type(value)(reversed(value.items())) if type(value) in (dict, OrderedDict) else value


def of_other_layouts(call: Call) -> Iterator[tuple[str, Call]]:
    """Calls with other layouts of all tensors, each with the condition that excludes it."""
    tensors = _tensors_of(call)
    strides = {index: x.mT.contiguous().mT for index, x in tensors.items() if x.dim() > 1}
    images = {index: x.contiguous(memory_format=torch.channels_last) for index, x in tensors.items() if x.dim() == 4}
    first = {index: x[:1].expand(x.shape) for index, x in tensors.items() if x.dim() > 1}
    moved = {index: torch.stack([x, x])[1] for index, x in tensors.items()}
    for made in (strides, images, first):
        if made:
            yield "is_contiguous()", _replaced(call, made)
    yield "storage_offset() == 0", _replaced(call, moved)


def equal_sizes(call: Call) -> Sizes:
    """The sizes of a call, if equal ones belong together."""
    found: dict[int, list[tuple[int, int]]] = {}
    for index, value in _tensors_of(call).items():
        for dimension, size in enumerate(value.shape):
            found.setdefault(size, []).append((index, dimension))
    return list(found.values())


def of_size_one(call: Call, sizes: Sizes) -> Iterator[tuple[frozenset[int], list[Call], list[Call]]]:
    """Sets of sizes that are 1: each alone, in pairs, and all; each with two lists of calls.

    In the second one, all other sizes are 2. A model needs to run only one call of a list.
    """
    # torch.export assumes that a size is at least 2, and drops what follows: so 1 beside the smallest others.
    every = range(len(sizes))
    chosen = [{index} for index in every] + [{*pair} for pair in itertools.combinations(every, 2)] + [set(every)]
    for ones in dict.fromkeys(map(frozenset, chosen)):
        wanted = dict.fromkeys(ones, 1)
        large, small = (
            [_resized(call, sizes, others | wanted, limit) for limit in (None, 1, 0)]
            for others in ({}, dict.fromkeys(every, 2))
        )
        yield ones, large, small


def of_other_sizes(call: Call, sizes: Sizes) -> Iterator[Call]:
    """Calls with smaller and with larger sizes."""
    every = range(len(sizes))
    for size in (2, 3, -1):
        yield _resized(call, sizes, dict.fromkeys(every, size))


def _resized(call: Call, sizes: Sizes, wanted: Mapping[int, int], limit: int | None = None) -> Call:
    """The call with the first items of some sizes; for -1, with its first item again at the end.

    `limit` is the largest integer, for indices and lengths that must fit into the new size.
    """
    tensors = _tensors_of(call)
    for which, size in wanted.items():
        for index, dimension in sizes[which]:
            x = tensors[index]
            part = x.narrow(dimension, 0, min(abs(size), x.shape[dimension]))
            tensors[index] = torch.cat([x, part], dimension) if size < 0 else part
    if limit is not None:
        integers = {i: x for i, x in tensors.items() if not (x.is_floating_point() or x.is_complex())}
        tensors |= {i: x.clamp(max=limit) for i, x in integers.items() if x.dtype is not torch.bool}
    return _replaced(call, tensors)
