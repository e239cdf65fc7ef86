"""A cache for values that a layer computes from its vectors, while no gradient is needed.

Writes through `.data` (as in weight averaging) do not change the version of a tensor. So a cached value is used only if
the vectors are equal to those that it was computed from. On a GPU this comparison would synchronize with the device, so
nothing is cached there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Entry(NamedTuple):
    key: Hashable
    sources: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


# Outside of the modules, so that copies, pickles and state dicts of a model do not contain it.
_CACHE: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()


def cached(
    owner: nn.Module, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The result of `make`, or its last result if key and sources are the same.

    Args:
        owner: each owner has one entry.
        key: what the result depends on besides the sources.
        sources: tensors on the CPU.
        make: called without gradients. If it returns one of `sources`, the cached clone is returned instead.

    Example:
        >>> vectors = nn.Linear(2, 2).weight
        >>> calls = []
        >>> def make():
        ...     calls.append("make")
        ...     return (vectors * 2,)
        >>> owner = nn.Identity()
        >>> for _ in range(2):
        ...     _ = cached(owner, "doubled", (vectors,), make)
        >>> vectors.data.zero_()
        tensor([[0., 0.],
                [0., 0.]])
        >>> cached(owner, "doubled", (vectors,), make)[0].sum(), calls
        (tensor(0.), ['make', 'make'])
    """
    entry = _CACHE.get(owner)
    if entry is not None and entry.key == key and _all_equal(entry.sources, sources):
        return entry.values
    with torch.inference_mode(False), torch.no_grad():
        copies = tuple(source.detach().clone() for source in sources)
        # The clone is in the processor's caches after the comparison; the source may not be.
        clone_of = {id(source): copy for source, copy in zip(sources, copies, strict=True)}
        values = tuple(clone_of.get(id(value), value) for value in make())
        _CACHE[owner] = _Entry(key, copies, values)
    return values


def _all_equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(map(tensors_equal, left, right))


def tensors_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors on the CPU have the same dtype, shape and values; NaN is not equal to NaN."""
    return left.dtype is right.dtype and torch.equal(left, right)
