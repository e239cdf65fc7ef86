"""The factors of all layers of a model, computed in batches at the start of its forward.

They belong to the run (`hra_fx.layers.running`). Hooks, dtypes and chains are checked at the start; a call of a layer
only checks what may change during a forward. A layer computes its own factors if it is called outside of a forward, or
if its vectors are not available at the start (FSDP2 gathers them layer by layer).
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_dynamo_compiling

from hra_fx import compat
from hra_fx.errors import HRAWarning
from hra_fx.functional.chain import ChainPart
from hra_fx.functional.householder import working_dtype
from hra_fx.kernels.batch import batched_factors
from hra_fx.kernels.dispatch import PLAIN, is_compiling, is_plain, is_plain_eager, products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.layers.accelerate_hooks import calls_class_forward
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.running import RUNNING, WITHOUT_FACTORS, Run
from hra_fx.layers.sharding import is_partitioned_by_zero3, is_trained_by_zero, sharded_by
from hra_fx.layers.target import REFLECTION

#: A container, its layer, and the parts of its chain.
_Chain: TypeAlias = tuple[HouseholderAdapters, nn.Module, list[ChainPart]]
#: The factors of a layer, the adapters that were active, and whether gradients were enabled.
_Prepared: TypeAlias = tuple[Factors, tuple[str, ...], bool]
#: Dtypes in which layers compute.
_COMPUTING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Containers with vectors that a warning about 16 bits has named.
_WARNED: WeakSet[HouseholderAdapters] = WeakSet()


class PreparedRun(Run):
    """A run with the factors of all layers that could be computed at its start.

    With `reuse`, forwards inside it, such as those of `generate`, use the same factors until something changes.
    """

    def __init__(self, chains: Sequence[_Chain], *, reuse: bool) -> None:
        """Compute the factors of some layers now."""
        super().__init__(_prepare(chains))
        self._vectors = [part.trained for _, _, parts in chains for part in parts] if reuse else []
        self._facts = self._now()

    def is_current(self) -> bool:
        """Whether a forward can use the factors. Writes to `.data` of a tensor are not detected."""
        return bool(self._vectors) and self._facts == self._now()

    def _now(self) -> list[object]:
        """What the factors depend on. `set_adapter` and `set_scale` make new tuples of active adapters."""
        if not self._vectors:
            return []
        modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        return [*modes, *compat.tensor_versions(self._vectors), *[id(adapters.active) for adapters in self.factors]]


def start_of_forward(layers: Sequence[nn.Module], *, reuse: bool = False) -> Run:
    """A run of a model with these layers, with their factors if they can be computed together now."""
    return PreparedRun(_chains(layers), reuse=reuse) if layers and is_plain_eager() else WITHOUT_FACTORS


def factors_in_traced_batches(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Context manager in which layers use factors that were computed together, while TorchDynamo traces."""
    return _Held(_prepare(_chains(layers)))


def factors_in_exported_batches(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Like `factors_in_traced_batches`, in plain operators while `torch.export` records.

    Without batches, each layer would take about a hundred nodes, including its backward pass.
    """
    groups: dict[tuple[object, ...], list[tuple[HouseholderAdapters, list[ChainPart]]]] = defaultdict(list)
    for adapters, _, parts in _chains(layers):
        if adapters.kind == "linear":
            form = [(part.form(), *[(x.shape, x.dtype, x.device) for x in part.tensors()]) for part in parts]
            groups[tuple(form)].append((adapters, parts))
    prepared: dict[HouseholderAdapters, Any] = {}
    for group in groups.values():
        dtype = working_dtype(group[0][1][0].trained.dtype)
        factors = batched_factors([parts for _, parts in group], dtype)
        prepared.update(zip([adapters for adapters, _ in group], factors, strict=True))
    return _Held(prepared)


class _Held:
    """Context manager in which the factors are attributes of the containers.

    After a graph break, layers with the same code share a compiled graph, and in this graph only an attribute of the
    layer itself belongs to the right layer. A class, because TorchDynamo of torch 2.6 cannot trace `contextmanager`.
    """

    def __init__(self, prepared: Mapping[HouseholderAdapters, Any]) -> None:
        self.prepared = prepared

    def __enter__(self) -> None:
        self.outer, RUNNING.run = RUNNING.run, WITHOUT_FACTORS  # for code that runs after a graph break
        for adapters, one in self.prepared.items():
            adapters.traced = one

    def __exit__(self, *_: object) -> None:
        RUNNING.run = self.outer
        for adapters in self.prepared:
            adapters.traced = None


def factors_for(adapters: HouseholderAdapters, x: Tensor) -> Factors | None:
    """The factors `R` and `F` of a layer for its input, in the dtype of their products.

    `None` if the layer must call its container: no adapter is active, the container has hooks, or a tracer records the
    plain formulas.
    """
    run = None if is_dynamo_compiling() else RUNNING.run
    if run is not None and (prepared := run.factors.get(adapters)) is not None and type(x) in PLAIN:
        factors, active, has_graph = prepared
        dtype = products_dtype(x.device, x.dtype) if compat.is_autocast_active() else x.dtype
        if (
            factors.rows.dtype is dtype
            and active is adapters.active
            and (has_graph or not torch.is_grad_enabled())
            and not compat.is_dispatch_mode_active()
        ):
            return factors  # type: ignore[no-any-return]
    if not uses_factors(adapters, x) or _must_be_called(adapters):
        return None
    return factors_of(adapters, products_dtype(x.device, x.dtype))


def uses_factors(adapters: HouseholderAdapters, x: Tensor) -> bool:
    """Whether a layer computes with its factors. Tracers and tensor subclasses use the plain formula."""
    if not (is_plain_eager() or is_compiling()) or not is_plain(x):
        return False
    return _prepared(adapters) is not None or all(is_plain(*part.tensors()) for part in adapters.chain_parts())


def factors_of(adapters: HouseholderAdapters, dtype: torch.dtype) -> Factors | None:
    """The factors `R` and `F` of the active adapters of a layer, in `dtype`; `None` for the identity."""
    if (prepared := _prepared(adapters)) is not None:
        factors, active, has_graph = prepared
        own = factors.rows.dtype
        # After a graph break, TorchDynamo makes a new tuple.
        is_same = active == adapters.active if is_compiling() else active is adapters.active
        if is_same and (has_graph or not torch.is_grad_enabled()):
            if own is dtype:
                return factors
            if torch.promote_types(own, dtype) is own:
                return factors._replace(rows=factors.rows.to(dtype), down=factors.down.to(dtype))
        if not is_compiling():
            adapters.last_compute_dtype = dtype
    parts = adapters.chain_parts()
    if not parts:
        return None
    adapters.check_data()
    if is_compiling():
        return batched_factors([parts], dtype)[0]
    # In its first run, a checkpointed block uses the factors of a batch. If it runs again in the backward, it computes
    # them here. The hooks hide the tensors that this saves: checkpoint raises an error if a run saves more tensors.
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return batched_factors([parts], dtype)[0]


def _prepared(adapters: HouseholderAdapters) -> _Prepared | None:
    if is_compiling():
        traced: _Prepared | None = adapters.traced
        return traced
    return None if RUNNING.run is None else RUNNING.run.factors.get(adapters)


def _must_be_called(adapters: HouseholderAdapters) -> bool:
    """Whether another tool wrapped the container, so that calling it does more than running its forward."""
    if type(adapters).forward is not HouseholderAdapters.forward or compat.has_own_hooks(adapters):
        return True
    return "forward" in adapters.__dict__ and not calls_class_forward(adapters)


def _chains(layers: Iterable[nn.Module]) -> list[_Chain]:
    """The layers that compute with factors, and whose adapters are not the identity and need not be called."""
    found: list[_Chain] = []
    places: list[tuple[Any, nn.Module]] = [(layer._modules.get(REFLECTION), layer) for layer in layers]
    # One look at all hooks, because this runs in each forward. While TorchDynamo traces, each layer looks itself.
    hooked = set() if is_compiling() else compat.with_own_hooks([one for one, _ in places if one is not None])
    for adapters, layer in places:
        if adapters is None or not adapters.reflects_input:
            continue
        # FSDP2 has hooks on containers that it shards. Here, their vectors were gathered before.
        if adapters in hooked and sharded_by(adapters) is None:
            continue
        if "forward" in adapters.__dict__ and not calls_class_forward(adapters):
            continue
        parts = adapters.chain_parts()
        if parts:
            found.append((adapters, layer, parts))
    return found


def _prepare(chains: Sequence[_Chain]) -> dict[HouseholderAdapters, _Prepared]:
    """Compute the factors of layers, with one batch for all chains of the same form."""
    has_graph = torch.is_grad_enabled()
    groups = _groups(chains)
    if has_graph and not is_compiling():
        _warn_of_low_precision(groups.values())
    found: dict[HouseholderAdapters, _Prepared] = {}
    for (dtype, _), group in groups.items():
        factors = batched_factors([parts for _, parts in group], dtype)
        for (adapters, _), one in zip(group, factors, strict=True):
            found[adapters] = one, adapters.active, has_graph
    return found


def _groups(chains: Sequence[_Chain]) -> dict[tuple[Any, ...], list[tuple[HouseholderAdapters, list[ChainPart]]]]:
    """Layers whose factors can be computed together: the dtype of the factors and the form of the chain -> layers."""
    compiling = is_compiling()
    has_autocast = compiling or compat.is_autocast_active()
    has_zero = "deepspeed" in sys.modules  # otherwise, no parameters are partitioned
    groups: dict[tuple[Any, ...], list[tuple[HouseholderAdapters, list[ChainPart]]]] = defaultdict(list)
    for adapters, layer, parts in chains:
        form = _form(parts, adapters.width, compiling=compiling, has_zero=has_zero)
        if form is None:
            continue
        weight = layer.__dict__["_parameters"].get(adapters.weight_name)
        is_known = type(weight) is nn.Parameter and weight.dtype in _COMPUTING and not has_autocast
        dtype = weight.dtype if is_known else _expected_dtype(adapters, layer, parts[0].trained)
        groups[dtype, form].append((adapters, parts))
    return groups


def _form(parts: Sequence[ChainPart], width: int, *, compiling: bool, has_zero: bool) -> tuple[object, ...] | None:
    """The values that must be equal for chains of one batch; `None` if the data of a tensor may be unavailable.

    FSDP, offloading and ZeRO-3 remove the data of vectors between calls of their layer.
    """
    found: tuple[object, ...] = ()
    for trained, kept, apply_GS, pairs in parts:
        shape = trained.shape
        if type(trained) not in PLAIN or trained.is_meta or len(shape) != 2 + pairs or shape[0] != width:
            return None
        if trained.dtype not in _COMPUTING or not (compiling or trained.untyped_storage().size()):
            return None
        if has_zero and not compiling and is_partitioned_by_zero3(trained):
            return None
        found += (apply_GS, pairs, shape, trained.dtype, trained.device)
        # Not a comprehension, which is a call in Python 3.11: this runs for each layer in each forward.
        found += (None if kept is None else (kept.shape, kept.device),)
    return found


def _warn_of_low_precision(groups: Iterable[Sequence[tuple[HouseholderAdapters, Sequence[ChainPart]]]]) -> None:
    """Warn, once for each model, if 16-bit vectors are trained, for example after a cast by TRL's trainers.

    For `r=8`, entries start at values up to 0.35. At this size, bfloat16 values are 1e-3 apart, and AdamW changes
    entries by about the learning rate. Pairs train in 16 bits like LoRA: their entries are as small as LoRA's. ZeRO and
    FSDP may keep float32 values elsewhere, so their vectors are ignored.
    """
    found = [
        (adapters, part.trained)
        for group in groups
        if any(part.trained.dtype.itemsize < 4 for part in group[0][1])
        for adapters, parts in group
        for part in parts
        if part.trained.dtype.itemsize < 4 and part.trained.requires_grad and adapters.training and not part.pairs
    ]
    containers = [one for one, vectors in found if not is_trained_by_zero(vectors) and sharded_by(one) is None]
    if containers and _WARNED.isdisjoint(containers):
        _WARNED.update(containers)
        warnings.warn(
            f"{containers[0].layer_path}: its trained vectors are {found[0][1].dtype}, so rounding cancels most "
            "optimizer steps at usual learning rates. Train them in float32, even in a 16-bit or quantized model. "
            "Before training, and after all casts (TRL's trainers cast them), set "
            "parameter.data = parameter.data.float() for each parameter with 'hra_u' in its name.",
            HRAWarning,
            stacklevel=2,
        )


def _expected_dtype(adapters: HouseholderAdapters, layer: nn.Module, vectors: Tensor) -> torch.dtype:
    """The dtype in which a layer is expected to compute, from its weight.

    For a 4-bit weight of bitsandbytes, this is unknown: PEFT's `prepare_model_for_kbit_training` casts inputs to
    float32.
    """
    weight = adapters.weight_of(layer)
    packed = getattr(weight, "quant_state", None)  # bitsandbytes
    dtype: torch.dtype = weight.dtype if packed is None else adapters.last_compute_dtype or packed.dtype
    # Weights in float8 are cast before they are used, and an offloaded weight is not on a device.
    return products_dtype(vectors.device, dtype if dtype in _COMPUTING else vectors.dtype)
