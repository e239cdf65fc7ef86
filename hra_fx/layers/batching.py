"""The factors of all layers of a model, computed in batches at the start of its forward.

A layer that is called outside of its model's forward, or whose vectors are not there at its start (FSDP2 gathers them
layer by layer), computes its own factors by the same functions.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hra_fx.functional.chain import ChainPart
from hra_fx.kernels.batch import batched_factors
from hra_fx.kernels.dispatch import is_compiling, is_plain, is_plain_eager, products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.layers.adapters import HouseholderAdapters, get_adapters


class _Start(NamedTuple):
    """What a forward has computed at its start.

    Attributes:
        layers: the layers for which it was computed.
        factors: container -> (its active adapters, their factors).
        has_graph: whether gradients were enabled.
        is_inference: whether inference mode was.
    """

    layers: tuple[nn.Module, ...]
    factors: dict[HouseholderAdapters, tuple[tuple[str, ...], Factors]]
    has_graph: bool
    is_inference: bool

    def is_usable(self) -> bool:
        """Whether it can be used in the grad mode of now."""
        is_trained_now = torch.is_grad_enabled() and not self.has_graph
        return not is_trained_now and self.is_inference == _is_inference()


class _Current(threading.local):
    """The forward that this thread runs; apart from that, the one that TorchDynamo traces.

    A compiled part of a model must not depend on what its model has computed outside of the graph: it would be
    compiled for each batch again.
    """

    def __init__(self) -> None:
        self.eager: _Start | None = None
        self.traced: _Start | None = None

    @property
    def start(self) -> _Start | None:
        return self.traced if is_compiling() else self.eager


_CURRENT = _Current()


@contextmanager
def factors_in_batches(layers: tuple[nn.Module, ...]) -> Iterator[None]:
    """A block in which `factors_of` returns factors that were computed at its start, or at that of a block around it.

    Args:
        layers: the adapted layers of a model.
    """
    is_traced = is_compiling()
    start = outer = _CURRENT.start
    if outer is None or outer.layers is not layers or not outer.is_usable():
        start = _compute(layers) if is_traced or is_plain_eager() else None
    try:
        _set(start, is_traced)
        yield
    finally:
        _set(outer, is_traced)


def factors_of(box: HouseholderAdapters, dtype: torch.dtype) -> Factors | None:
    """`R` and `F` of the active adapters of a layer, in `dtype`; `None` if they do nothing.

    Raises:
        AdapterError: the vectors have no data yet.
    """
    start = _CURRENT.start
    if start is not None and start.is_usable() and box in start.factors:
        names, factors = start.factors[box]
        if names == box.active:
            return factors if factors.rows.dtype is dtype else Factors(factors.rows.to(dtype), factors.down.to(dtype))
    parts = box.chain_parts()
    if not parts:
        return None
    box.check_data()
    if is_compiling():
        return batched_factors([parts], dtype)[0]
    # A checkpointed block that runs again in the backward must save the tensors of its first run, which had a batch.
    with saved_tensors_hooks(_same, _same):
        return batched_factors([parts], dtype)[0]


def has_batch(box: HouseholderAdapters) -> bool:
    """Whether the factors of a layer were computed at the start of the forward that this thread runs."""
    start = _CURRENT.start
    return start is not None and box in start.factors


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _set(start: _Start | None, is_traced: bool) -> None:
    if is_traced:
        _CURRENT.traced = start
    else:
        _CURRENT.eager = start


def _compute(layers: tuple[nn.Module, ...]) -> _Start:
    groups: dict[tuple[torch.dtype, object], list[tuple[HouseholderAdapters, list[ChainPart]]]] = defaultdict(list)
    for layer in layers:
        box = get_adapters(layer)  # none in a layer that was folded alone
        parts = box.chain_parts() if box is not None else []
        if box is not None and parts and all(_is_here(part.vectors, box.width) for part in parts):
            dtype = _expected_dtype(box.weight_of(layer), parts[0].vectors)
            groups[dtype, tuple([part.signature for part in parts])].append((box, parts))
    found: dict[HouseholderAdapters, tuple[tuple[str, ...], Factors]] = {}
    for (dtype, _), group in groups.items():
        factors = batched_factors([parts for _, parts in group], dtype)
        found |= {box: (box.active, one) for (box, _), one in zip(group, factors, strict=True)}
    return _Start(layers, found, torch.is_grad_enabled(), _is_inference())


def _is_inference() -> bool:
    """Whether inference mode is enabled; a graph of TorchDynamo is in one mode, and cannot ask."""
    return not is_compiling() and torch.is_inference_mode_enabled()


def _expected_dtype(weight: Tensor, vectors: Tensor) -> torch.dtype:
    """The dtype in which a layer will compute, as far as its weight tells."""
    packed = getattr(weight, "quant_state", None)  # bitsandbytes
    dtype: torch.dtype = weight.dtype if packed is None else packed.dtype
    return products_dtype(weight.device, dtype if dtype.is_floating_point else vectors.dtype)


def _is_here(tensor: Tensor, width: int) -> bool:
    """Whether a tensor has its data: FSDP and offloading take it away between the calls of a layer."""
    if not is_plain(tensor) or tensor.is_meta or tensor.shape[0] != width:
        return False
    return is_compiling() or tensor.untyped_storage().size() > 0
