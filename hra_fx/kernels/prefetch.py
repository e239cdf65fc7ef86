"""What all sites of a model need of their vectors alone, made before the first of them runs.

It is made by a few small operators each. Between two layers, whose weights sweep the caches, most of their time goes
into fetching their code; one site after another they take a third of it. What one forward asked for, the next one has.
It is taken only where the vectors are, number for number, those that it was made of: who writes through `.data`, as
averages, FSDP and DeepSpeed do, leaves the version of a tensor as it was.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hra_fx.compat import tensor_version
from hra_fx.functional import householder
from hra_fx.kernels.cache import same_numbers
from hra_fx.kernels.dispatch import unobserved

_Made = TypeVar("_Made")
#: Gives what belongs to each of some tuples of tensors, alike in shape and dtype; a constant to autograd.
Make: TypeAlias = Callable[[Sequence[tuple[Tensor, ...]]], Sequence[_Made]]
_Key: TypeAlias = tuple[object, ...]


class _Wish(NamedTuple):
    """What was asked for: by which function it is made, of what, and what these were like."""

    make: Make[Any]
    sources: tuple[Tensor, ...]
    likeness: tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass
class _Forward:
    """A forward of a model.

    Attributes:
        ready: by function and identity of its sources, what was made ahead, with copies of them.
        chains: by function and identity of a chain of this forward, what was made by the way, with the chain's version.
        asked: what the next forward should have.
    """

    ready: dict[_Key, tuple[tuple[Tensor, ...], Any]] = field(default_factory=dict)
    chains: dict[_Key, tuple[Tensor, int, Any]] = field(default_factory=dict)
    asked: dict[_Key, _Wish] = field(default_factory=dict)


class _Local(threading.local):
    """The forward that this thread is in."""

    forward: _Forward | None = None


_NOW = _Local()
# With the tensors themselves, for torch exchanges none that a weak reference points to.
_ASKED: weakref.WeakKeyDictionary[nn.Module, dict[_Key, _Wish]] = weakref.WeakKeyDictionary()


@contextmanager
def ahead(root: nn.Module) -> Iterator[None]:
    """Have ready what the last forward of a model asked for, while this one runs with gradients.

    Args:
        root: the model.
    """
    if not torch.is_grad_enabled() or not unobserved():
        yield
        return
    around, forward = _NOW.forward, _Forward()
    try:
        _NOW.forward = forward
        for make, alike in _grouped(_ASKED.get(root, {}).values()):
            # A layer that cannot be served now makes its own, and tells what is wrong.
            with suppress(Exception), householder.without_autocast(alike[0][0]), torch.no_grad():
                copies = zip(*(torch.stack(part).unbind() for part in zip(*alike, strict=True)), strict=True)
                for sources, own, made in zip(alike, copies, make(alike), strict=True):
                    forward.ready[(make, *map(id, sources))] = (own, made)
        yield
        _ASKED[root] = forward.asked
    finally:
        _NOW.forward = around


def forget(root: nn.Module) -> None:
    """Hold nothing any more for a model that is no longer adapted."""
    _ASKED.pop(root, None)


def ready(make: Make[_Made], *sources: Tensor) -> _Made:
    """What a function makes of some tensors: made ahead, where it was and they are as they were.

    Args:
        make: the function.
        sources: what it is to be made of.
    """
    forward = _NOW.forward
    if forward is not None and sources[0].is_cpu:
        key = (make, *map(id, sources))
        if all(source.is_leaf and not source.is_inference() for source in sources):  # and so there the next time
            forward.asked[key] = _Wish(make, sources, _likeness(sources))
            copies, made = forward.ready.get(key, ((), None))
            if copies and all(map(same_numbers, copies, sources)):
                return made  # type: ignore[no-any-return]
        elif (known := forward.chains.get(key)) is not None and known[1] == tensor_version(sources[0]):
            return known[2]  # type: ignore[no-any-return]
    return make([sources])[0]


def announce(make: Make[Any], chain: Tensor, made: object) -> None:
    """Have something ready that was made by the way, of a tensor of this forward; outside of one, nothing."""
    if _NOW.forward is not None:
        _NOW.forward.chains[make, id(chain)] = (chain, tensor_version(chain), made)


def _likeness(sources: tuple[Tensor, ...]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple([(source.shape, source.dtype) for source in sources])


def _grouped(wishes: Iterable[_Wish]) -> Iterator[tuple[Make[Any], list[tuple[Tensor, ...]]]]:
    """Those that can be made in one go.

    What a tool gives its numbers for the time that its layer runs is left out: it has no storage now (FSDP), or another
    shape or dtype.
    """
    groups: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
    for make, sources, likeness in wishes:
        there = all(source.is_cpu and source.untyped_storage().size() for source in sources)
        if there and _likeness(sources) == likeness:
            groups[make, likeness].append(sources)
    for (make, _), alike in groups.items():
        yield make, alike
