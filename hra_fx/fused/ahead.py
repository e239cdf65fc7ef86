"""What all sites of a model need of their vectors alone, made before the first of them runs.

It is made by a few small operators each. Between two layers, whose weights sweep the caches, most of their time goes
into fetching their code; one site after another they take a third of it. What one forward asked for, the next one has.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hra_fx.fused.conditions import unobserved

_Made = TypeVar("_Made")
#: Gives what belongs to each of some tuples of tensors, alike in shape and dtype, on the CPU; a constant to autograd.
Make: TypeAlias = Callable[[Sequence[tuple[Tensor, ...]]], Sequence[_Made]]
_Key: TypeAlias = tuple[object, ...]


class _Wish(NamedTuple):
    """What was asked for: by which function it is made, of what, and what these were like."""

    make: Make[Any]
    sources: tuple[weakref.ref[Tensor], ...]
    likeness: tuple[tuple[torch.Size, torch.dtype], ...]


class _Known(NamedTuple):
    """What is ready, with the tensors that it was made of, and in which state they were."""

    sources: tuple[Tensor, ...]
    state: tuple[tuple[int, int], ...]
    made: Any


class _Forward(threading.local):
    """Of the forward that this thread is in, by function and identity of the sources; `ready` is `None` outside."""

    ready: dict[_Key, _Known] | None = None
    asked: dict[_Key, _Wish]


_NOW = _Forward()
_ASKED: weakref.WeakKeyDictionary[nn.Module, dict[_Key, _Wish]] = weakref.WeakKeyDictionary()


@contextmanager
def ahead(root: nn.Module) -> Iterator[None]:
    """Have ready what the last forward of a model asked for, while this one runs with gradients.

    Args:
        root: the model.
    """
    if _NOW.ready is not None or not torch.is_grad_enabled() or not unobserved():
        yield
        return
    _NOW.ready, _NOW.asked = {}, {}
    try:
        for make, alike in _grouped(_ASKED.get(root, {}).values()):
            for sources, made in zip(alike, make(alike), strict=True):
                announce(make, sources, made)
        yield
        _ASKED[root] = _NOW.asked
    finally:
        _NOW.ready, _NOW.asked = None, {}


def ready(make: Make[_Made], *sources: Tensor) -> _Made:
    """What a function makes of some tensors: made ahead, where it was and they have not been written to since.

    Args:
        make: the function.
        sources: what it is to be made of.
    """
    if _NOW.ready is not None and not any(source.is_inference() for source in sources):
        key = (make, *map(id, sources))
        if all(source.is_leaf for source in sources):  # and so there the next time
            _NOW.asked[key] = _Wish(make, tuple(map(weakref.ref, sources)), _likeness(sources))
        known = _NOW.ready.get(key)
        # The identity of what has gone may be another's by now, but what is known holds its sources.
        if known is not None and known.state == _state(sources):
            made: _Made = known.made
            return made
    return make([sources])[0]


def announce(make: Make[Any], sources: tuple[Tensor, ...], made: object) -> None:
    """Have something ready that was made by the way; outside of a forward, nothing."""
    if _NOW.ready is not None:
        _NOW.ready[(make, *map(id, sources))] = _Known(sources, _state(sources), made)


def _state(sources: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """What changes when a tensor is written to, or is given another storage through `.data`, as by DeepSpeed."""
    return tuple([(source._version, source.data_ptr()) for source in sources])


def _likeness(sources: tuple[Tensor, ...]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple([(source.shape, source.dtype) for source in sources])


def _grouped(wishes: Iterable[_Wish]) -> Iterator[tuple[Make[Any], list[tuple[Tensor, ...]]]]:
    """Those that can be made in one go.

    What has gone since is left out, and so is what a tool gives its numbers for the time that its layer runs alone: it
    has no storage now (FSDP), or another shape or dtype.
    """
    groups: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
    for make, references, likeness in wishes:
        sources = tuple(source for reference in references if (source := reference()) is not None)
        there = all(source.is_cpu and source.untyped_storage().size() for source in sources)
        if there and _likeness(sources) == likeness:
            groups[make, likeness].append(sources)
    for (make, _), alike in groups.items():
        yield make, alike
