"""The factors of all layers of a model, computed in batches at the start of its forward.

One layer's factors take a dozen small operators, and their gradient as many. In a batch of all layers with vectors of
one shape they take as many in all. A layer that is called outside of its model's forward, or whose vectors are not
there at its start (FSDP2 gathers them layer by layer), computes its own factors by the same functions.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hra_fx.functional import householder
from hra_fx.kernels.dispatch import is_plain, is_plain_eager
from hra_fx.kernels.factors import Factors, wy_factors
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.chain import ChainPart, plain_chain


class _Batch:
    """The factors of some layers whose adapters have the same shapes."""

    def __init__(self, layers: Sequence[Sequence[ChainPart]]) -> None:
        """Compute them, in the grad mode of now.

        Args:
            layers: the parts of the chain of each layer.
        """
        self.has_graph = torch.is_grad_enabled()
        self.is_inference = torch.is_inference_mode_enabled()
        self._reached: set[int] = set()
        parts = [self._stacked([layer[place] for layer in layers]) for place in range(len(layers[0]))]
        self._wide = wy_factors(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
        self._split: dict[tuple[torch.dtype, bool], list[Factors]] = {}

    def factors(self, index: int, dtype: torch.dtype) -> Factors:
        """Those of one layer, in the dtype of its products."""
        key = dtype, torch.is_grad_enabled()  # a cast that was made without gradients has no graph
        if key not in self._split:
            split: tuple[Tensor, ...] = _Unbind.apply(self._reached, *(tensor.to(dtype) for tensor in self._wide))  # type: ignore[no-untyped-call]
            count = len(split) // 2
            self._split[key] = [Factors(*pair) for pair in zip(split[:count], split[count:], strict=True)]
        return self._split[key][index]

    def _stacked(self, parts: Sequence[ChainPart]) -> Tensor:
        """One part of the chains of all layers, `(n, d, k)`, at least float32."""
        vectors: Tensor = _Stack.apply(self._reached, *(part.vectors for part in parts))  # type: ignore[no-untyped-call]
        anchors = [part.anchor for part in parts if part.anchor is not None]
        with householder.without_autocast(vectors):
            wide = vectors.to(householder.working_dtype(vectors.dtype))
            return plain_chain(wide, torch.stack(anchors) if anchors else None, apply_GS=parts[0].apply_GS)


class _Stack(torch.autograd.Function):
    """`torch.stack`, with a gradient for those layers alone that the backward pass has reached.

    An optimizer moves parameters whose gradient is zero (by their momentum), and leaves those without one alone.
    """

    @staticmethod
    def forward(ctx: Any, reached: set[int], *tensors: Tensor) -> Tensor:
        ctx.reached = reached
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(part if index in ctx.reached else None for index, part in enumerate(grad.unbind()))


class _Unbind(torch.autograd.Function):
    """`torch.unbind` of several tensors; its backward notes which layers it has reached."""

    @staticmethod
    def forward(ctx: Any, reached: set[int], *stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reached, ctx.like = reached, stacked[0][0].detach()
        return tuple(part for tensor in stacked for part in tensor.unbind())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grads) // 2
        ctx.reached.update(place % count for place, grad in enumerate(grads) if grad is not None)
        filled = [torch.zeros_like(ctx.like) if grad is None else grad for grad in grads]
        return None, torch.stack(filled[:count]), torch.stack(filled[count:])


#: Layer -> (its active adapters, the batch that has their factors, the index in there).
_Batches: TypeAlias = dict[HouseholderAdapters, tuple[tuple[str, ...], _Batch, int]]


class _Current(threading.local):
    """What the forward that this thread runs has computed at its start."""

    batches: _Batches | None = None


_CURRENT = _Current()


class _Known(NamedTuple):
    """The batch of an earlier forward: what it depends on besides the vectors, copies of them, and the batch."""

    key: object
    values: Sequence[Tensor]
    batch: _Batch


# By the first layer of a batch; outside of the modules, so that copies and pickles of a model do not have it.
_LAST: weakref.WeakKeyDictionary[HouseholderAdapters, _Known] = weakref.WeakKeyDictionary()


@contextmanager
def factors_in_batches(boxes: Iterable[HouseholderAdapters]) -> Iterator[None]:
    """A block in which `factors_of` returns factors that were computed at its start.

    Args:
        boxes: the containers of adapters of a model.
    """
    outer = _CURRENT.batches
    try:
        _CURRENT.batches = _batches(boxes) if is_plain_eager() else {}
        yield
    finally:
        _CURRENT.batches = outer


def factors_of(box: HouseholderAdapters, dtype: torch.dtype) -> Factors | None:
    """`R` and `F` of the active adapters of a layer, in `dtype`; `None` if they do nothing.

    Raises:
        AdapterError: the vectors have no data yet.
    """
    names, batch, index = (_CURRENT.batches or {}).get(box, ((), None, 0))
    if batch is not None and names is box.active and _is_usable(batch):
        return batch.factors(index, dtype)
    parts = box.chain_parts()
    if not parts:
        return None
    box.check_data()
    # A checkpointed block that runs again in the backward must save the tensors of its first run, which had a batch.
    with saved_tensors_hooks(_same, _same):
        return _Batch([parts]).factors(0, dtype)


def has_batch(box: HouseholderAdapters) -> bool:
    """Whether the factors of a layer were computed at the start of the forward that this thread runs."""
    return _CURRENT.batches is not None and box in _CURRENT.batches


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_usable(batch: _Batch) -> bool:
    """Whether what was computed at the start can be used in the grad mode of now."""
    is_trained_now = torch.is_grad_enabled() and not batch.has_graph
    return not is_trained_now and batch.is_inference == torch.is_inference_mode_enabled()


def _batches(boxes: Iterable[HouseholderAdapters]) -> _Batches:
    groups: dict[object, list[tuple[HouseholderAdapters, list[ChainPart]]]] = defaultdict(list)
    for box in boxes:
        parts = box.chain_parts()
        if parts and all(_is_here(tensor, box.width) for part in parts for tensor in part.tensors):
            groups[tuple([part.signature for part in parts])].append((box, parts))
    found: _Batches = {}
    for group in groups.values():
        batch = _batch_of(group[0][0], [parts for _, parts in group])
        found |= {box: (box.active, batch, index) for index, (box, _) in enumerate(group)}
    return found


def _batch_of(first: HouseholderAdapters, layers: Sequence[Sequence[ChainPart]]) -> _Batch:
    """A batch; on a CPU and without gradients the one of the last forward, if all vectors are equal to those of then.

    To compare them takes a fifth of the time, which is a tenth of a forward of one token. On a GPU it would wait for
    the device.
    """
    if torch.is_grad_enabled() or not layers[0][0].vectors.is_cpu:
        return _Batch(layers)
    columns = zip(*([tensor for part in layer for tensor in part.tensors] for layer in layers), strict=True)
    values = [torch.stack(column) for column in columns]
    key = torch.is_inference_mode_enabled(), len(layers), [part.signature for part in layers[0]]
    known = _LAST.get(first)
    if known is None or known.key != key or not all(map(torch.equal, known.values, values)):
        known = _LAST[first] = _Known(key, values, _Batch(layers))
    return known.batch


def _is_here(tensor: Tensor, width: int) -> bool:
    """Whether a tensor has its data: FSDP and offloading take it away between the calls of a layer."""
    return is_plain(tensor) and not tensor.is_meta and len(tensor) == width and bool(tensor.untyped_storage().size())
