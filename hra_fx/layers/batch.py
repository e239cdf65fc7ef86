"""The factors of all layers of a model, computed together at the start of its forward.

A layer computes its own factors if it is called outside of a forward, if a tool must first provide its vectors (FSDP,
ZeRO-3, offloading), or if its vectors or its input are not what they were at the start.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.functional.factors import Changes, Factors, batched_factors
from hra_fx.functional.householder import products_dtype, working_dtype
from hra_fx.layers.accelerate_hooks import calls_class_forward
from hra_fx.layers.adapter_states import check_orthonormal
from hra_fx.layers.adapters import HouseholderAdapters, Place
from hra_fx.layers.running import RUNNING, WITHOUT_FACTORS, Run, sources_of
from hra_fx.layers.sharding import is_partitioned_by_zero3, is_sharded
from hra_fx.layers.target import KEPT, REFLECTION

#: The classes of ordinary tensors.
_PLAIN = (Tensor, nn.Parameter)
#: Dtypes in which layers compute.
_COMPUTING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: With `requires_grad`: a checkpointed block, which runs again without a batch, must save as many tensors then.
_FACTS = operator.attrgetter("__class__", "shape", "dtype", "device", "requires_grad")
_FORWARD = operator.attrgetter("forward")


class _Group(NamedTuple):
    """Layers whose chains have the same form, so that their factors are one computation.

    Attributes:
        owners: the containers of the layers.
        forwards: the forward of each container, which accelerate may replace.
        holders, names: where the tensors of the chains are, in the order of `batched_factors`.
        facts: class, shape, dtype, device and flag of each tensor.
        forms: how each part of a chain is computed (`chain.vectors_of`).
        dtype: the dtype of the products.
    """

    owners: list[HouseholderAdapters]
    forwards: list[Any]
    holders: list[dict[str, Any]]
    names: list[str]
    facts: list[Any]
    forms: list[int]
    dtype: torch.dtype

    def values(self) -> list[Tensor] | None:
        """The tensors of the chains, or `None` if something else than their values has changed."""
        # No calls of Python functions for each layer, because this runs in each forward.
        tensors: list[Any] = list(map(dict.get, self.holders, self.names))
        same = list(map(_FACTS, tensors)) == self.facts and list(map(_FORWARD, self.owners)) == self.forwards
        if not same or not all(map(Tensor.data_ptr, tensors)) or any(map(any, map(compat.HOOKS, self.owners))):
            return None
        return tensors


class _Batch:
    """The layers of a model in groups, which are found again when anything but values has changed."""

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.changes = -1
        self.kept: dict[str, Tensor] = {}
        self.versions: list[int] = []

    def values(self, layers: Callable[[], Iterable[nn.Module]]) -> list[tuple[_Group, list[Tensor]]]:
        """Each group, and its tensors."""
        changes = self.changes
        groups = self.groups  # another thread may replace them
        if changes == Changes.count and "deepspeed" not in sys.modules:  # DeepSpeed frees values
            found = list(map(_Group.values, groups))
            if None not in found:
                if self.kept and compat.tensor_versions([*self.kept.values()]) != self.versions:
                    self.check_kept(groups)
                return list(zip(groups, found, strict=True))  # type: ignore[arg-type]
        changes, groups = Changes.count, _groups(layers())
        self.groups = groups
        self.changes = changes
        self.check_kept(groups)
        return list(zip(groups, map(_Group.values, groups), strict=True))  # type: ignore[arg-type]

    def check_kept(self, groups: Iterable[_Group]) -> None:
        """Check the kept directions of all layers at once, because a check waits for the device."""
        self.kept = {
            f"{owner.layer_path}.{REFLECTION}.{name.removesuffix(KEPT)}": holder[name]
            for group in groups
            for owner, holder, name in zip(itertools.cycle(group.owners), group.holders, group.names, strict=False)
            if name.endswith(KEPT)
        }
        check_orthonormal(self.kept)
        self.versions = compat.tensor_versions([*self.kept.values()])


#: They are not attributes of the models, so that copies, pickles and graphs do not have them.
_BATCHES: WeakKeyDictionary[nn.Module, _Batch] = WeakKeyDictionary()


def start(model: nn.Module, layers: Callable[[], Iterable[nn.Module]]) -> Run:
    """Start a run of a model, or of its body, with the factors of its adapted layers.

    Forwards in one call of `generate` use the same factors. A replica of DataParallel has no parameters, and FSDP would
    reduce the gradients of a block before the batch has its gradients. Then each layer computes its own factors.
    """
    if not compat.is_plain_eager() or getattr(model, compat.REPLICA, False):
        return WITHOUT_FACTORS
    if torch.distributed.is_available() and torch.distributed.is_initialized() and is_sharded(model):
        return WITHOUT_FACTORS
    generation = RUNNING.generation
    if generation is not None and (last := generation.get(model)) is not None and last.is_valid(()):
        return last
    batch = _BATCHES.get(model) or _BATCHES.setdefault(model, _Batch())
    run = Run.now()
    for group, tensors in batch.values(layers):
        dtype = products_dtype(tensors[0].device, group.dtype) if compat.is_autocast_active() else group.dtype
        sources = sources_of(group.holders, group.names, tensors)
        factors = batched_factors(tensors, group.forms, dtype)
        for index, owner in enumerate(group.owners):
            run.prepared[owner] = *factors[index], sources[index :: len(group.owners)]
    if generation is not None:
        generation[model] = run
    return run


def _groups(layers: Iterable[nn.Module]) -> list[_Group]:
    """Group the layers that compute with factors, and whose vectors are available before the layers run."""
    found: dict[Any, list[tuple[HouseholderAdapters, list[Place]]]] = defaultdict(list)
    for adapters, layer in _owners(layers):
        parts = adapters.places()
        places = [place for _, held in parts for place in held]
        tensors = [held[name] for held, name in places]
        if tensors and all(_is_available(tensor, adapters.width) for tensor in tensors):
            facts = tuple([(type(one), one.shape, one.dtype, one.device, one.requires_grad) for one in tensors])
            dtype = adapters.weight_of(layer).dtype
            dtype = dtype if dtype in _COMPUTING else tensors[0].dtype  # a quantized weight
            found[tuple([form for form, _ in parts]), facts, dtype].append((adapters, places))
    groups = []
    for (forms, facts, dtype), members in found.items():
        owners = [adapters for adapters, _ in members]
        # `batched_factors` takes the first tensor of all layers, then the second one.
        places = [places[index] for index in range(len(facts)) for _, places in members]
        holders, names = [holder for holder, _ in places], [name for _, name in places]
        forwards = [] if torch.compiler.is_compiling() else list(map(_FORWARD, owners))
        every = [fact for fact in facts for _ in members]
        groups.append(_Group(owners, forwards, holders, names, every, list(forms), dtype))
    return groups


def _owners(layers: Iterable[nn.Module]) -> list[tuple[HouseholderAdapters, nn.Module]]:
    """The containers with active adapters of layers that reflect their input, and that need not be called."""
    places: list[tuple[Any, nn.Module]] = [(layer._modules.get(REFLECTION), layer) for layer in layers]
    acting = [(own, layer) for own, layer in places if own is not None and own.reflects_input and own.active]
    if torch.compiler.is_compiling():
        return acting
    hooked = {own for own, _ in acting if any(compat.HOOKS(own))}
    free = [own not in hooked and ("forward" not in vars(own) or calls_class_forward(own)) for own, _ in acting]
    return [pair for pair, is_free in zip(acting, free, strict=True) if is_free]


def _is_available(tensor: Tensor, width: int) -> bool:
    """Whether a tensor has its values now. FSDP, offloading and ZeRO-3 remove them between the calls of a layer."""
    if torch.compiler.is_compiling():
        return True
    plain = type(tensor) in _PLAIN and tensor.dtype in _COMPUTING and tensor.dim() > 1 and tensor.shape[0] == width
    return plain and bool(tensor.data_ptr()) and not is_partitioned_by_zero3(tensor)


def traced_batch(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Context manager in which layers use factors that were computed together, while TorchDynamo traces."""
    return _Held(_groups(layers))


def exported_batch(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Like `traced_batch`, in plain operators while `torch.export` records: only for Linear layers.

    Without batches, each layer would take about a hundred nodes, including its backward pass.
    """
    linear = [group for group in _groups(layers) if group.owners[0].kind == "linear"]
    return _Held([one._replace(dtype=working_dtype(one.holders[0][one.names[0]].dtype)) for one in linear])


class _Held:
    """Context manager in which the factors are attributes of the containers.

    After a graph break, layers with the same code share a compiled graph, and in this graph only an attribute of the
    layer itself belongs to the right layer. A class, because TorchDynamo of torch 2.6 cannot trace `contextmanager`.
    """

    def __init__(self, groups: list[_Group]) -> None:
        self.factors: dict[HouseholderAdapters, Factors] = {}
        for group in groups:
            tensors = [holder[name] for holder, name in zip(group.holders, group.names, strict=True)]
            self.factors.update(zip(group.owners, batched_factors(tensors, group.forms, group.dtype), strict=True))

    def __enter__(self) -> None:
        self.outer, RUNNING.run = RUNNING.run, WITHOUT_FACTORS  # for code that runs after a graph break
        for adapters, factors in self.factors.items():
            adapters.traced = *factors, torch.is_grad_enabled()

    def __exit__(self, *_: object) -> None:
        RUNNING.run = self.outer
        for adapters in self.factors:
            adapters.traced = None
