"""The factors of all layers of a model, computed together at the start of its forward.

A layer computes its own factors if it is called outside of a forward, if a tool must first provide its vectors (FSDP,
ZeRO-3, offloading), or if its vectors or its input are not what they were at the start.
"""

from __future__ import annotations

import operator
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import HRAWarning
from hra_fx.functional.householder import working_dtype
from hra_fx.kernels.batch import batched_factors
from hra_fx.kernels.dispatch import PLAIN, is_plain_eager, products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.layers.accelerate_hooks import calls_class_forward
from hra_fx.layers.adapters import HouseholderAdapters, Place
from hra_fx.layers.running import RUNNING, WITHOUT_FACTORS, Changes, Prepared, Run
from hra_fx.layers.sharding import is_partitioned_by_zero3, is_trained_by_zero
from hra_fx.layers.target import REFLECTION

#: Dtypes in which layers compute.
_COMPUTING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FACTS = operator.attrgetter("__class__", "shape", "dtype", "device")
#: Containers with vectors that a warning about 16 bits has named.
_WARNED: WeakSet[HouseholderAdapters] = WeakSet()


class _Group(NamedTuple):
    """Layers whose chains have the same form, so that their factors are one computation.

    Attributes:
        owners: the containers of the layers.
        seen: for each container, a `forward` that accelerate has set, and the dtype of its layer's inputs, if known.
        places: where the tensors of the chains are, in the order of `batched_factors`.
        facts: class, shape, dtype and device of each tensor.
        forms: how each part of a chain is computed (`ChainPart.form`).
        dtype: the dtype of the products.
    """

    owners: list[HouseholderAdapters]
    seen: list[Any]
    places: list[tuple[dict[str, Any], str]]
    facts: list[Any]
    forms: list[int]
    dtype: torch.dtype

    def values(self) -> list[Tensor] | None:
        """The tensors of the chains, or `None` if something else than their values has changed."""
        tensors: list[Any] = [place.get(name) for place, name in self.places]
        if list(map(_FACTS, tensors)) != self.facts or not all(map(Tensor.data_ptr, tensors)):
            return None
        if _seen(self.owners) != self.seen or compat.with_own_hooks(self.owners):
            return None
        return tensors


class Batch:
    """The layers of a model in groups, which are found again when anything but values has changed."""

    def __init__(self) -> None:
        """Start without groups."""
        self._groups: list[_Group] = []
        self._changes = -1

    def start(self, layers: Callable[[], Iterable[nn.Module]], cache: Any = None) -> Run:
        """A run of a model with these layers, with the factors that can be computed now.

        Forwards with the same `cache` and without gradients are steps of one generation, and use the same factors.
        """
        if not is_plain_eager():
            return WITHOUT_FACTORS
        reference = None if cache is None or torch.is_grad_enabled() else _weak(cache)
        if reference is not None and (last := RUNNING.generation) is not None:
            batch, of_cache, run = last
            if batch is self and of_cache() is cache and run.changes == Changes.count:
                return run
        run = self._prepare(layers)
        RUNNING.generation = None if reference is None else (self, reference, run)
        return run

    def _prepare(self, layers: Callable[[], Iterable[nn.Module]]) -> Run:
        values = [group.values() for group in self._groups] if self._changes == Changes.count else [None]
        if None in values or "deepspeed" in sys.modules:  # DeepSpeed frees values
            self._groups, self._changes = _groups(layers()), Changes.count
            values = [group.values() for group in self._groups]
        run = Run()
        if run.has_graph and any(dtype.itemsize < 4 for group in self._groups for _, _, dtype, _ in group.facts[:1]):
            _warn_of_low_precision([owner for group in self._groups for owner in group.owners])
        for group, tensors in zip(self._groups, values, strict=True):
            if tensors is not None:
                run.prepared.update(_prepared(group, tensors))
        return run


#: They are not attributes of the models, so that copies, pickles and graphs do not have them.
_BATCHES: WeakKeyDictionary[nn.Module, Batch] = WeakKeyDictionary()


def batch_of(model: nn.Module) -> Batch:
    """The batch of a model, or of its body."""
    batch = _BATCHES.get(model)
    if batch is None:
        batch = _BATCHES[model] = Batch()
    return batch


def _weak(cache: Any) -> Any:
    """A weak reference to a cache, or `None` if it is a tuple."""
    try:
        return weakref.ref(cache)
    except TypeError:
        return None


def _prepared(group: _Group, tensors: list[Tensor]) -> Iterator[tuple[HouseholderAdapters, Prepared]]:
    """Compute the factors of a group."""
    dtype = products_dtype(tensors[0].device, group.dtype) if compat.is_autocast_active() else group.dtype
    versions = compat.tensor_versions(tensors)
    factors = batched_factors(tensors, group.forms, dtype)
    size = len(group.owners)
    places: Any = zip(group.places, tensors, versions, strict=True)
    watched = [(place, name, tensor, version) for (place, name), tensor, version in places]
    for index, owner in enumerate(group.owners):
        yield owner, (*factors[index], watched[index::size])


def _groups(layers: Iterable[nn.Module]) -> list[_Group]:
    """Group the layers that compute with factors, and whose vectors are available before the layers run."""
    found: dict[Any, list[tuple[HouseholderAdapters, list[Place]]]] = defaultdict(list)
    for adapters, layer in _owners(layers):
        parts = adapters.places()
        places = [place for _, held in parts for place in held]
        tensors = [held[name] for held, name in places]
        if tensors and all(_is_available(tensor, adapters.width) for tensor in tensors):
            facts = tuple([(type(one), one.shape, one.dtype, one.device) for one in tensors])
            key = tuple([form for form, _ in parts]), facts, _expected_dtype(adapters, layer, tensors[0])
            found[key].append((adapters, places))
    return [_group(forms, facts, dtype, members) for (forms, facts, dtype), members in found.items()]


def _group(
    forms: Any, facts: Any, dtype: torch.dtype, members: list[tuple[HouseholderAdapters, list[Place]]]
) -> _Group:
    owners = [adapters for adapters, _ in members]
    # `batched_factors` takes the first tensor of all layers, then the second one.
    places = [places[index] for index in range(len(facts)) for _, places in members]
    return _Group(owners, _seen(owners), places, [fact for fact in facts for _ in members], list(forms), dtype)


def _seen(owners: Iterable[HouseholderAdapters]) -> list[Any]:
    return [(owner.__dict__.get("forward"), owner.compute_dtype) for owner in owners]


def _owners(layers: Iterable[nn.Module]) -> list[tuple[HouseholderAdapters, nn.Module]]:
    """The containers with active adapters of layers that reflect their input, and that need not be called."""
    places: list[tuple[Any, nn.Module]] = [(layer._modules.get(REFLECTION), layer) for layer in layers]
    acting = [(own, layer) for own, layer in places if own is not None and own.reflects_input and own.active]
    if torch.compiler.is_compiling():
        return acting
    hooked = compat.with_own_hooks([own for own, _ in acting])
    free = [own not in hooked and ("forward" not in vars(own) or calls_class_forward(own)) for own, _ in acting]
    return [pair for pair, is_free in zip(acting, free, strict=True) if is_free]


def _is_available(tensor: Tensor, width: int) -> bool:
    """Whether a tensor has its values now. FSDP, offloading and ZeRO-3 remove them between the calls of a layer."""
    if torch.compiler.is_compiling():
        return True
    plain = type(tensor) in PLAIN and tensor.dtype in _COMPUTING and tensor.dim() > 1 and tensor.shape[0] == width
    return plain and bool(tensor.data_ptr()) and not is_partitioned_by_zero3(tensor)


def _expected_dtype(adapters: HouseholderAdapters, layer: nn.Module, vectors: Tensor) -> torch.dtype:
    """The dtype of the products of a layer: that of its last call, if it was not the one of its weight."""
    if adapters.compute_dtype is not None:
        return adapters.compute_dtype
    dtype = adapters.weight_of(layer).dtype
    return dtype if dtype in _COMPUTING else vectors.dtype  # a quantized weight


def _warn_of_low_precision(containers: list[HouseholderAdapters]) -> None:
    """Warn, once for each model, if 16-bit vectors are trained, for example after a cast by TRL's trainers.

    For `r=8`, entries start at values up to 0.35. At this size, bfloat16 values are 1e-3 apart, and AdamW changes
    entries by about the learning rate. Pairs train in 16 bits like LoRA: their entries are as small as LoRA's. ZeRO
    keeps float32 values elsewhere, so its vectors are ignored.
    """
    held = [(adapters, adapters[name], name) for adapters in containers for name in adapters.active]
    found = [
        (adapters, vectors.dtype)
        for adapters, vectors, name in held
        if vectors.requires_grad and vectors.dtype.itemsize < 4 and adapters.training
        if not adapters.specs[name].pairs and not is_trained_by_zero(vectors)
    ]
    if found and _WARNED.isdisjoint(containers):
        _WARNED.update(containers)
        warnings.warn(
            f"{found[0][0].layer_path}: its trained vectors are {found[0][1]}, so rounding cancels most optimizer "
            "steps at usual learning rates. Train them in float32, even in a 16-bit or quantized model. Before "
            "training, and after all casts (TRL's trainers cast them), set parameter.data = parameter.data.float() for "
            "each parameter with 'hra_u' in its name.",
            HRAWarning,
            stacklevel=2,
        )


def traced_batch(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Context manager in which layers use factors that were computed together, while TorchDynamo traces."""
    return _Held(_groups(layers))


def exported_batch(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Like `traced_batch`, in plain operators while `torch.export` records: only for Linear layers.

    Without batches, each layer would take about a hundred nodes, including its backward pass.
    """
    found = _groups(layers)
    return _Held([one._replace(dtype=_wide(one)) for one in found if one.owners[0].kind == "linear"])


def _wide(group: _Group) -> torch.dtype:
    place, name = group.places[0]
    return working_dtype(place[name].dtype)


class _Held:
    """Context manager in which the factors are attributes of the containers.

    After a graph break, layers with the same code share a compiled graph, and in this graph only an attribute of the
    layer itself belongs to the right layer. A class, because TorchDynamo of torch 2.6 cannot trace `contextmanager`.
    """

    def __init__(self, groups: list[_Group]) -> None:
        self.factors: dict[HouseholderAdapters, Factors] = {}
        for group in groups:
            tensors = [place[name] for place, name in group.places]
            self.factors.update(zip(group.owners, batched_factors(tensors, group.forms, group.dtype), strict=True))

    def __enter__(self) -> None:
        self.outer, RUNNING.run = RUNNING.run, WITHOUT_FACTORS  # for code that runs after a graph break
        for adapters, factors in self.factors.items():
            adapters.traced = *factors, torch.is_grad_enabled()

    def __exit__(self, *_: object) -> None:
        RUNNING.run = self.outer
        for adapters in self.factors:
            adapters.traced = None
