"""The factors of all layers of a model, computed in batches at the start of its forward.

A layer that is called outside of its model's forward, or whose vectors are not there at its start (FSDP2 gathers them
layer by layer), computes its own factors by the same functions. In a mixed batch (`hra_fx.layers.mixed`), a layer has
the factors of each adapter of the batch.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hra_fx.compat import is_exporting, tensor_version
from hra_fx.functional.chain import ChainPart
from hra_fx.kernels.batch import batched_factors, plain_factors
from hra_fx.kernels.dispatch import is_compiling, is_plain, is_plain_eager, products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.kernels.mixed import RowFactors, stack_chains
from hra_fx.layers.adapters import HouseholderAdapters, get_adapters
from hra_fx.layers.low_precision_warning import warn_of_low_precision
from hra_fx.layers.mixed import CURRENT, MixedBatch, mixed_batch_of
from hra_fx.layers.partitioned import comes_and_goes

#: (dtype, signatures) -> layers with the parts of their chains, which are computed together.
_Groups: TypeAlias = dict[tuple[torch.dtype, object], list[tuple[HouseholderAdapters, list[ChainPart]]]]
#: The number of chains that are computed together in a mixed batch; more would not fit into the caches of a CPU.
_CHAINS_AT_ONCE = 64


class Prepared(NamedTuple):
    """The factors of one layer, computed at the start of a forward, and what they were computed for.

    Attributes:
        factors: `R` and `F`; in a mixed batch, of each of its adapters.
        active: the adapters that were active.
        has_graph: whether gradients were enabled.
        is_inference: whether inference mode was.
    """

    factors: Factors | RowFactors
    active: tuple[str, ...]
    has_graph: bool
    is_inference: bool

    def is_usable(self, active: tuple[str, ...], dtype: torch.dtype) -> bool:
        """Whether they can be used for these adapters in the current grad mode, without a loss of precision."""
        if self.active != active or self.is_inference != _is_inference():
            return False
        if torch.is_grad_enabled() and not self.has_graph:
            return False
        own = self.factors.rows.dtype
        return own is dtype or torch.promote_types(own, dtype) is own


class StartOfForward(NamedTuple):
    """What a forward, or `generate`, has computed at its start.

    Attributes:
        prepared: container -> the factors of its layer.
        modes: whether gradients and inference mode were enabled, and the mixed batch.
        sources: the tensors from which the factors were computed, with their versions and devices; none if they are
            not to be used again.
    """

    prepared: dict[HouseholderAdapters, Prepared]
    modes: tuple[object, ...]
    sources: list[tuple[Tensor, tuple[int, torch.device]]] | None

    @contextmanager
    def used(self) -> Iterator[None]:
        """A block in which `factors_of` returns these factors."""
        outer, _CURRENT.start = _CURRENT.start, self
        try:
            yield
        finally:
            _CURRENT.start = outer

    def is_current(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the same would be computed now. Writes to `.data` of a tensor have no version, and are not seen."""
        if self.sources is None or self.modes != (*_modes(), CURRENT.batch):
            return False
        now = _sources(layers)
        if len(now) != len(self.sources):
            return False
        pairs = zip(self.sources, now, strict=True)
        return all(old is new and before == after for (old, before), (new, after) in pairs)


class _Current(threading.local):
    """What the forward that this thread runs has computed at its start."""

    def __init__(self) -> None:
        self.start: StartOfForward | None = None


_CURRENT = _Current()


@contextmanager
def factors_in_batches(layers: Sequence[nn.Module], *, reuse: bool = False) -> Iterator[None]:
    """A block in which `factors_of` returns factors that were computed at its start.

    Args:
        layers: the adapted layers of a model.
        reuse: whether blocks inside this one use them too, until the vectors or the adapters change.
    """
    outer = _CURRENT.start
    try:
        if outer is None or not outer.is_current(layers):
            _CURRENT.start = start_of_forward(layers, reuse=reuse) if is_plain_eager() else None
        yield
    finally:
        _CURRENT.start = outer


@contextmanager
def factors_in_traced_batches(layers: Sequence[nn.Module]) -> Iterator[None]:
    """As `factors_in_batches`, while TorchDynamo traces.

    The factors are attributes of the containers: after a graph break, layers with the same code share a compiled graph,
    in which only an attribute of the layer itself is that of the right layer.
    """
    prepared = _prepare(layers)
    try:
        for box, one in prepared.items():
            box.prepared = one
        yield
    finally:
        for box in prepared:
            box.prepared = None


@contextmanager
def factors_in_exported_batches(layers: Iterable[nn.Module]) -> Iterator[None]:
    """As `factors_in_batches`, while `torch.export` records, in plain operators.

    `exported_factors` returns the factors. One layer alone takes some hundred nodes with its backward pass.
    """
    groups: dict[tuple[object, ...], list[tuple[HouseholderAdapters, list[ChainPart]]]] = defaultdict(list)
    for box in filter(None, map(get_adapters, layers)):
        if box.is_called and box.kind == "linear" and mixed_batch_of(box) is None and (parts := box.chain_parts()):
            groups[tuple([part.signature() for part in parts])].append((box, parts))
    found: dict[HouseholderAdapters, Prepared] = {}
    for group in groups.values():
        factors = plain_factors([parts for _, parts in group])
        for (box, _), one in zip(group, factors, strict=True):
            found[box] = Prepared(one, box.active, *_modes())
    with StartOfForward(found, _modes(), None).used():
        yield


def exported_factors(box: HouseholderAdapters) -> Factors | None:
    """`R` and `F` of a layer, from `factors_in_exported_batches`; `None` outside of it."""
    prepared = _prepared(box) if is_exporting() else None
    return None if prepared is None else prepared.factors  # type: ignore[return-value]  # no rows of a mixed batch


@contextmanager
def batch_of_rows(batch: MixedBatch) -> Iterator[None]:
    """A block in which the rows of the batch have their own adapters."""
    outer = CURRENT.batch, _CURRENT.start
    try:
        CURRENT.batch, _CURRENT.start = batch, None
        yield
    finally:
        CURRENT.batch, _CURRENT.start = outer


def factors_of(box: HouseholderAdapters, dtype: torch.dtype) -> Factors | RowFactors | None:
    """`R` and `F` of the active adapters of a layer, in `dtype`; `None` if they do nothing.

    In a mixed batch, they are those of each of its adapters.

    Raises:
        AdapterError: the vectors have no data yet.
    """
    prepared = _prepared(box)
    if prepared is not None and prepared.is_usable(box.active, dtype):
        factors = prepared.factors
        if factors.rows.dtype is dtype:
            return factors
        return factors._replace(rows=factors.rows.to(dtype), down=factors.down.to(dtype))
    if prepared is not None and not is_compiling():
        box.asked_for = dtype
    if (batch := mixed_batch_of(box)) is not None:
        own = _chains_of_rows(box)
        box.check_data(own)
        chains = [own.get(name) for name in batch.names]
        return _of_rows(batched_factors([[stack_chains(chains)]], dtype)[0], batch) if own else None
    parts = box.chain_parts()
    if not parts:
        return None
    box.check_data()
    if is_compiling():
        return batched_factors([parts], dtype)[0]
    # A checkpointed block that runs again in the backward must save the tensors of its first run, which had a batch.
    with saved_tensors_hooks(_same, _same):
        return batched_factors([parts], dtype)[0]


def is_in_forward() -> bool:
    """Whether this thread runs a forward, or `generate`, that has computed factors at its start."""
    return _CURRENT.start is not None


def has_batch(box: HouseholderAdapters) -> bool:
    """Whether the factors of a layer were computed at the start of the forward that runs."""
    return _prepared(box) is not None


def _prepared(box: HouseholderAdapters) -> Prepared | None:
    if is_compiling():
        traced: Prepared | None = box.prepared
        return traced
    return None if _CURRENT.start is None else _CURRENT.start.prepared.get(box)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def start_of_forward(layers: Sequence[nn.Module], *, reuse: bool = False) -> StartOfForward:
    """The factors of some layers now."""
    return StartOfForward(_prepare(layers), (*_modes(), CURRENT.batch), _sources(layers) if reuse else None)


def _prepare(layers: Sequence[nn.Module]) -> dict[HouseholderAdapters, Prepared]:
    if CURRENT.batch is not None:
        return _prepare_rows(layers, CURRENT.batch)
    groups: _Groups = defaultdict(list)
    for layer in layers:
        box = get_adapters(layer)  # none in a layer that was folded alone
        parts = box.chain_parts() if box is not None else []
        if box is not None and parts and _are_here(box, parts):
            dtype = _expected_dtype(box, layer, parts[0].vectors)
            groups[dtype, tuple([part.signature() for part in parts])].append((box, parts))
    if torch.is_grad_enabled() and not is_compiling():
        warn_of_low_precision(groups.values())
    found: dict[HouseholderAdapters, Prepared] = {}
    for (dtype, _), group in groups.items():
        factors = batched_factors([parts for _, parts in group], dtype)
        for (box, _), one in zip(group, factors, strict=True):
            found[box] = Prepared(one, box.active, *_modes())
    return found


def _prepare_rows(layers: Sequence[nn.Module], batch: MixedBatch) -> dict[HouseholderAdapters, Prepared]:
    """As `_prepare`, with the factors of each adapter of a mixed batch."""
    groups: _Groups = defaultdict(list)
    for layer in layers:
        box = get_adapters(layer)
        own = {} if box is None else _chains_of_rows(box)
        if box is not None and own and _are_here(box, own.values()):
            chains = stack_chains([own.get(name) for name in batch.names])
            dtype = _expected_dtype(box, layer, chains.vectors)
            groups[dtype, chains.signature()].append((box, [chains]))
    found: dict[HouseholderAdapters, Prepared] = {}
    at_once = max(1, _CHAINS_AT_ONCE // len(batch.names))
    for (dtype, _), group in groups.items():
        for start in range(0, len(group), at_once):
            some = group[start : start + at_once]
            factors = batched_factors([parts for _, parts in some], dtype)
            for (box, _), one in zip(some, factors, strict=True):
                found[box] = Prepared(_of_rows(one, batch), box.active, *_modes())
    return found


def _chains_of_rows(box: HouseholderAdapters) -> dict[str, ChainPart]:
    """The chains of the adapters of a mixed batch that do something in a layer."""
    batch = mixed_batch_of(box)
    names = [] if batch is None else [name for name in batch.names if name in box.specs]
    return {name: part for name in names for part in box.chain_parts([name])}


def _of_rows(factors: Factors, batch: MixedBatch) -> RowFactors:
    return RowFactors(*factors, None if batch.places is None else batch.places.to(factors.rows.device))


def _sources(layers: Sequence[nn.Module]) -> list[tuple[Tensor, tuple[int, torch.device]]]:
    boxes = [box for layer in layers if (box := get_adapters(layer)) is not None]
    chains = [box.chain_parts() if CURRENT.batch is None else _chains_of_rows(box).values() for box in boxes]
    vectors = [part.vectors for own in chains for part in own]
    return [(tensor, (tensor_version(tensor), tensor.device)) for tensor in vectors]


def _modes() -> tuple[bool, bool]:
    """Whether gradients and inference mode are enabled."""
    return torch.is_grad_enabled(), _is_inference()


def _is_inference() -> bool:
    """Whether inference mode is enabled; a graph of TorchDynamo is in one mode, and cannot ask."""
    return not is_compiling() and torch.is_inference_mode_enabled()


def _expected_dtype(box: HouseholderAdapters, layer: nn.Module, vectors: Tensor) -> torch.dtype:
    """The dtype in which a layer will compute, as far as its weight tells.

    A 4-bit weight of bitsandbytes does not tell: PEFT's `prepare_model_for_kbit_training` makes the inputs float32.
    """
    weight = box.weight_of(layer)
    packed = getattr(weight, "quant_state", None)  # bitsandbytes
    dtype: torch.dtype = weight.dtype if packed is None else box.asked_for or packed.dtype
    computes = dtype.is_floating_point and dtype.itemsize > 1  # weights in float8 are cast before they are used
    return products_dtype(vectors.device, dtype if computes else vectors.dtype)  # an offloaded weight is on no device


def _are_here(box: HouseholderAdapters, parts: Iterable[ChainPart]) -> bool:
    return all(_is_here(tensor, box.width) for part in parts for tensor in part.tensors())


def _is_here(tensor: Tensor, width: int) -> bool:
    """Whether a tensor has its data, and keeps it; FSDP, offloading and ZeRO-3 take it away between calls."""
    if not is_plain(tensor) or tensor.is_meta or tensor.dim() != 2 or tensor.shape[0] != width:
        return False
    return is_compiling() or (tensor.untyped_storage().size() > 0 and not comes_and_goes(tensor))
