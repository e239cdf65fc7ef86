"""Factors that one forward requested are computed up front in the next one, in batches.

Each factor takes a few small operators. Run between two large layers, whose weights evict the processor's caches, they
take three times as long as in one batch. A prefetched factor is used only if the vectors are equal to those that it was
computed from: writes through `.data`, as in weight averaging, FSDP and DeepSpeed, do not change a tensor's version.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hra_fx.compat import tensor_version
from hra_fx.functional import householder
from hra_fx.kernels.cache import tensors_equal
from hra_fx.kernels.dispatch import is_plain_eager

_Value = TypeVar("_Value")
#: Computes the values of several tuples of tensors, all of the same shapes and dtypes; constants to autograd.
Compute: TypeAlias = Callable[[Sequence[tuple[Tensor, ...]]], Sequence[_Value]]
_Key: TypeAlias = tuple[object, ...]


class _Request(NamedTuple):
    """A requested value: the function, its tensors, and their shapes and dtypes at the time of the request."""

    compute: Compute[Any]
    sources: tuple[Tensor, ...]
    signature: tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass
class _Forward:
    """The state of one forward of a model.

    Attributes:
        prefetched: by function and ids of its tensors: copies of the tensors, and the value.
        published: by function and id of a tensor of this forward: the tensor, its version, and the value.
        requested: what the next forward should prefetch.
    """

    prefetched: dict[_Key, tuple[tuple[Tensor, ...], Any]] = field(default_factory=dict)
    published: dict[_Key, tuple[Tensor, int, Any]] = field(default_factory=dict)
    requested: dict[_Key, _Request] = field(default_factory=dict)


class _Local(threading.local):
    """The forward that this thread is running."""

    forward: _Forward | None = None


_CURRENT = _Local()
# Holds the tensors themselves: torch cannot swap tensors that have weak references.
_REQUESTS: weakref.WeakKeyDictionary[nn.Module, dict[_Key, _Request]] = weakref.WeakKeyDictionary()


@contextmanager
def prefetching(root: nn.Module) -> Iterator[None]:
    """Prefetch what the last forward of a model requested, for the forward inside this context, if gradients are on.

    Args:
        root: the model.
    """
    if not torch.is_grad_enabled() or not is_plain_eager():
        yield
        return
    outer, forward = _CURRENT.forward, _Forward()
    try:
        _CURRENT.forward = forward
        for compute, batch in _batches(_REQUESTS.get(root, {}).values()):
            with householder.without_autocast(batch[0][0]), torch.no_grad():
                copies = zip(*(torch.stack(part).unbind() for part in zip(*batch, strict=True)), strict=True)
                for sources, own, value in zip(batch, copies, compute(batch), strict=True):
                    forward.prefetched[(compute, *map(id, sources))] = (own, value)
        yield
        _REQUESTS[root] = forward.requested
    finally:
        _CURRENT.forward = outer


def clear_requests(root: nn.Module) -> None:
    """Release what is stored for a model, when its adapters are removed."""
    _REQUESTS.pop(root, None)


def get_or_compute(compute: Compute[_Value], *sources: Tensor) -> _Value:
    """The value of a function: prefetched if its tensors have not changed since, else computed now.

    Args:
        compute: the function.
        sources: its tensors.
    """
    forward = _CURRENT.forward
    if forward is not None and sources[0].is_cpu:
        key = (compute, *map(id, sources))
        if all(source.is_leaf and not source.is_inference() for source in sources):  # still there in the next forward
            forward.requested[key] = _Request(compute, sources, _signature(sources))
            copies, value = forward.prefetched.get(key, ((), None))
            if copies and all(map(tensors_equal, copies, sources)):
                return value  # type: ignore[no-any-return]
        elif (known := forward.published.get(key)) is not None and known[1] == tensor_version(sources[0]):
            return known[2]  # type: ignore[no-any-return]
    return compute([sources])[0]


def publish(compute: Compute[Any], chain: Tensor, value: object) -> None:
    """Store a value for `get_or_compute` that is known already, of a tensor of the current forward, if there is one."""
    if _CURRENT.forward is not None:
        _CURRENT.forward.published[compute, id(chain)] = (chain, tensor_version(chain), value)


def _signature(sources: tuple[Tensor, ...]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple([(source.shape, source.dtype) for source in sources])


def _batches(requests: Iterable[_Request]) -> Iterator[tuple[Compute[Any], list[tuple[Tensor, ...]]]]:
    """Requests grouped by function, shapes and dtypes.

    Tensors that have no storage now (FSDP frees it between layers), or another shape or dtype, are left to their layer.
    """
    groups: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
    for compute, sources, signature in requests:
        present = all(source.is_cpu and source.untyped_storage().size() for source in sources)
        if present and _signature(sources) == signature:
            groups[compute, signature].append(sources)
    for (compute, _), batch in groups.items():
        yield compute, batch
