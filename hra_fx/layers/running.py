"""Which model runs in this thread, and the factors that were computed when it started.

Two things depend on it: while a model runs, the weight of an adapted layer reads as `W Q` (`hra_fx.layers.weight`), and
its layers use the factors that were computed for all of them at the start (`hra_fx.layers.batch`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from hra_fx import compat
from hra_fx.functional.factors import Changes, Factors
from hra_fx.functional.householder import products_dtype

#: Where a tensor is, its name there, the tensor, and its version and address when something was computed from it.
Source: TypeAlias = tuple[dict[str, Any], str, Tensor, int, int]


class Run(NamedTuple):
    """A forward of a model in one thread, and what decides whether values that were computed at its start are right.

    Attributes:
        prepared: container of a layer -> its factors `R` and `F`, and the tensors that they were computed from.
        has_graph: whether they were computed with gradients.
        changes, backwards: those of `Changes` when they were computed.
    """

    prepared: dict[Any, tuple[Tensor, Tensor, list[Source]]]
    has_graph: bool = False
    changes: int = 0
    backwards: int = 0

    @classmethod
    def now(cls) -> Run:
        """A run that starts now."""
        return cls({}, torch.is_grad_enabled(), Changes.count, Changes.backwards)

    def is_valid(self, sources: Iterable[Source]) -> bool:
        """Whether values that were computed from `sources` at the start of this run are still right."""
        if self.changes != Changes.count or self.backwards != Changes.backwards:
            return False
        if (torch.is_grad_enabled() and not self.has_graph) or compat.is_dispatch_mode_active():
            return False
        for holder, name, tensor, version, address in sources:
            if holder.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version >= 0 and compat.VERSION(tensor) != version:  # a tensor of inference mode has none
                return False
        return True


def sources_of(holders: Iterable[dict[str, Any]], names: Iterable[str], tensors: list[Any]) -> list[Source]:
    """The tensors with these names, with their present versions and addresses."""
    addresses = map(Tensor.data_ptr, tensors)
    return list(zip(holders, names, tensors, compat.tensor_versions(tensors), addresses, strict=True))


class Reader(NamedTuple):
    """The innermost forward in this thread that reads weights by itself (`hra_fx.layers.weight.running`).

    Attributes:
        module: its module.
        read: the weights that it has read: the layer; a tensor with the version, but not the memory, of `W Q`; and this
            version at the time of the read.
        experts: `W Q` of experts, which loop over it: (layer, whether with gradients) -> weight, the run that started
            then, and the tensors that it was computed from.
    """

    module: nn.Module
    read: list[tuple[nn.Module, Tensor, int]]
    experts: dict[tuple[nn.Module, bool], tuple[Tensor, Run, list[Source]]]


class _Running(threading.local):
    """What runs in this thread."""

    def __init__(self) -> None:
        # TorchDynamo would guard that a class attribute is not an attribute of the object, which its first call breaks.
        self.run: Run | None = None
        self.reader: Reader | None = None
        #: In a call of `generate`: model -> its last run.
        self.generation: dict[nn.Module, Run] | None = None


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


def factors_for(adapters: Any, x: Tensor, compute: Callable[..., Factors | None] | None = None) -> Factors | None:
    """The factors of a layer for its input: those of the run, or its own; `None` if no adapter is active.

    Own factors come from `compute`, or from a call of the container, so that FSDP, ZeRO-3 and offloading can first
    provide its vectors.
    """
    if not adapters.active:
        return None
    run = None if is_dynamo_compiling() else RUNNING.run
    if run is not None and (found := run.prepared.get(adapters)) is not None and run.is_valid(found[2]):
        rows, down, _ = found
        if rows.dtype is x.dtype:
            return rows, down
        dtype = products_dtype(x.device, x.dtype)
        if rows.dtype is dtype or rows.dtype.itemsize > dtype.itemsize:
            return rows.to(dtype), down.to(dtype)
    dtype = products_dtype(x.device, x.dtype)
    if adapters.traced is not None:
        rows, down, has_graph = adapters.traced
        if has_graph or not torch.is_grad_enabled():
            return rows.to(dtype), down.to(dtype)
    return (compute or adapters)(dtype=dtype)
