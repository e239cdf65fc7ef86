"""Which model runs in this thread, and the factors that were computed when it started.

Two things depend on it: while a model runs, the weight of an adapted layer reads as `W Q` (`hra_fx.layers.weight`), and
its layers use the factors that were computed for all of them at the start (`hra_fx.layers.batch`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from hra_fx import compat
from hra_fx.functional.householder import products_dtype
from hra_fx.kernels.factors import Factors

#: The factors of a layer, `R` and `F`, and the parameter that they were computed from: where the container has it, its
#: name, the parameter, and its version and address at that time. The last entry has the same facts of other adapters.
Prepared: TypeAlias = tuple[Tensor, Tensor, dict[str, Any], str, Tensor, int, int, list[Any]]


class Changes:
    """Counts changes after which prepared factors are wrong: other active adapters, scales or kept directions."""

    count = 0


class Run(NamedTuple):
    """A forward of a model in one thread.

    Attributes:
        prepared: container of a layer -> its factors.
        has_graph: whether they were computed with gradients.
        changes: `Changes.count` when they were computed.
    """

    prepared: dict[Any, Prepared]
    has_graph: bool = False
    changes: int = 0


class Reader(NamedTuple):
    """The innermost forward in this thread that reads weights by itself (`hra_fx.layers.weight.running`).

    Attributes:
        module: its module.
        read: the weights that it has read: the layer; a tensor with the version, but not the memory, of `W Q`; and this
            version at the time of the read.
        experts: `W Q` of experts, which loop over it: (layer, whether with gradients) -> weight.
    """

    module: nn.Module
    read: list[tuple[nn.Module, Tensor, int]]
    experts: dict[tuple[nn.Module, bool], Tensor]


class _Running(threading.local):
    """What runs in this thread."""

    def __init__(self) -> None:
        # TorchDynamo would guard that a class attribute is not an attribute of the object, which its first call breaks.
        self.run: Run | None = None
        self.reader: Reader | None = None
        #: The last forward with a cache (`generate`): cache -> a weak reference to the model, and the run.
        self.generation: WeakKeyDictionary[Any, tuple[Callable[[], object], Run]] = WeakKeyDictionary()


RUNNING = _Running()
#: A run without factors: of a part of a model that is called alone, or while a tracer records.
WITHOUT_FACTORS = Run({})


def during(run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a run, and restore the outer run."""
    outer, RUNNING.run = RUNNING.run, run
    try:
        return function(*args, **kwargs)
    finally:
        RUNNING.run = outer


def factors_for(adapters: Any, x: Tensor) -> Factors | None:
    """The factors of a layer for its input: those of the run, or its own; `None` if no adapter is active.

    Own factors come from a call of the container, so that FSDP, ZeRO-3 and offloading can first provide its vectors.
    """
    if not adapters.active:
        return None
    if not is_dynamo_compiling() and (found := prepared_factors(adapters, x)) is not None:
        return found
    dtype = products_dtype(x.device, x.dtype)
    if adapters.traced is not None:
        rows, down, has_graph = adapters.traced
        if has_graph or not torch.is_grad_enabled():
            return rows.to(dtype), down.to(dtype)
    own: Factors | None = adapters(dtype=dtype)
    return own


def prepared_factors(adapters: Any, x: Tensor) -> Factors | None:
    """The factors that were computed at the start of the run, if they still fit the layer and its input `x`."""
    run = RUNNING.run
    if run is None or run.changes != Changes.count or (found := run.prepared.get(adapters)) is None:
        return None
    if (torch.is_grad_enabled() and not run.has_graph) or compat.is_dispatch_mode_active():
        return None
    rows, down, *first, others = found
    for holder, name, tensor, version, address in [cast(Any, first), *others]:
        if holder.get(name) is not tensor or tensor.data_ptr() != address:
            return None
        if version >= 0 and compat.VERSION(tensor) != version:
            return None
    if rows.dtype is x.dtype:
        return rows, down
    if compat.is_autocast_active():
        return (rows, down) if rows.dtype is products_dtype(x.device, x.dtype) else None
    adapters.compute_dtype = x.dtype  # for the next run
    return None
