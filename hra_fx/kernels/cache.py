"""What a site computes from its vectors alone, kept from call to call while no gradient is asked for.

Whoever writes through `.data` (as averages of weights do) leaves the version of a tensor as it was. So what is kept is
taken only where the vectors are, number for number, those that it was made of; on a GPU that look would have to wait
for the device, and nothing is kept there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Kept(NamedTuple):
    key: Hashable
    sources: tuple[Tensor, ...]
    made: tuple[Tensor, ...]


# Beside the modules, not in them: copies, pickles and states of a model know nothing of it.
_OF: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def kept(
    owner: nn.Module, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `make` gives, or gave when the sources were the same.

    Args:
        owner: one thing is kept for each.
        key: what it depends on besides the sources.
        sources: tensors on the CPU.
        make: makes it; called without gradients. A source itself in what it gives stands for a copy of it.

    Example:
        >>> vectors = nn.Linear(2, 2).weight
        >>> calls = []
        >>> def make():
        ...     calls.append("made")
        ...     return (vectors * 2,)
        >>> owner = nn.Identity()
        >>> for _ in range(2):
        ...     _ = kept(owner, "doubled", (vectors,), make)
        >>> vectors.data.zero_()
        tensor([[0., 0.],
                [0., 0.]])
        >>> kept(owner, "doubled", (vectors,), make)[0].sum(), calls
        (tensor(0.), ['made', 'made'])
    """
    known = _OF.get(owner)
    if known is not None and known.key == key and _alike(known.sources, sources):
        return known.made
    with torch.inference_mode(False), torch.no_grad():
        copies = tuple(source.detach().clone() for source in sources)
        # What was not changed is in the caches once it has been compared.
        unchanged = {id(source): copy for source, copy in zip(sources, copies, strict=True)}
        made = tuple(unchanged.get(id(part), part) for part in make())
        _OF[owner] = _Kept(key, copies, made)
    return made


def _alike(ones: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(ones) == len(others) and all(map(same_numbers, ones, others))


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU are equal number for number, and of one dtype; NaN equals nothing."""
    return one.dtype is other.dtype and torch.equal(one, other)
