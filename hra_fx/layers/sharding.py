"""Parameters that are sharded over several processes: FSDP2 (`fully_shard`) and DeepSpeed's ZeRO.

While an FSDP2 module runs, its parameters are plain tensors, and adapters do not see shards. Outside of its forward,
they are `DTensor`s, or plain tensors that FSDP2 frees later: call `reshard` before you change or keep a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from hra_fx.compat import loaded_class

T = TypeVar("T")
_FSDP = "torch.distributed.fsdp"
#: Why a layer cannot be adapted after its weight was split, or split after it was adapted; without the final period.
SPLIT = (
    "tensor parallelism splits its weight, and adapters need the whole weight. Train with FSDP2 or DDP instead. For "
    "inference, call hra_fx.fold first"
)


def sharded_by(module: nn.Module) -> str | None:
    """The tool that shards the parameters of a module, or `None`."""
    if isinstance(module, loaded_class(_FSDP, "FSDPModule")):
        return "fully_shard"
    flat = isinstance(module, loaded_class(_FSDP, "FullyShardedDataParallel"))
    return "FullyShardedDataParallel" if flat else None


def is_sharded(model: nn.Module) -> bool:
    """Whether a tool shards the parameters of any module of a model. Fast if there is only one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return any(sharded_by(module) for module in model.modules())


def is_partitioned_by_zero3(tensor: Tensor) -> bool:
    """Whether DeepSpeed partitions a parameter between the calls of its layer, although it may be complete now.

    With one process, or after a prefetch, it is complete early. The backward pass of its layer partitions it again, and
    a gradient that arrives later does not fit.
    """
    return not getattr(tensor, "ds_persist", True)


def is_trained_by_zero(vectors: Tensor) -> bool:
    """Whether `deepspeed.initialize` has prepared the vectors of an adapter: stages 1 and 2, or stage 3."""
    return hasattr(vectors, "_hp_mapping") or hasattr(vectors, "ds_id")


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether a tensor is a `DTensor`; this process may have only a part of it."""
    return isinstance(tensor, loaded_class("torch.distributed.tensor", "DTensor"))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free unsharded parameters that FSDP2 modules among `modules` still have after their last forward."""
    group = loaded_class(_FSDP, "FSDPModule")  # looked up once, so that switching adapters is fast
    for module in modules if group else ():
        if isinstance(module, group):
            module.reshard()


def device_of_values(device: torch.device) -> torch.device:
    """Return the device, or the CPU for the meta device, where values would be lost."""
    return torch.device("cpu") if device.type == "meta" else device


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a `DTensor`. Every process that has a shard must call this. Differentiable.

    Each process gets the gradient of its own shard, as if all processes computed the same values.
    """
    gathered: Any = tensor
    return gathered.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(values: Tensor, like: Tensor) -> Tensor:
    """Distribute values that every process has, or that are distributed, like the tensor `like`. No communication."""
    if not is_dtensor(like) or is_dtensor(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    shards: Any = like
    values = values.to(like.device)
    return distribute_tensor(values, shards.device_mesh, shards.placements, src_data_rank=None)


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager in which modules, but not their children, have full tensors instead of shards.

    Every process that has a shard must enter it, with the modules in the same order.
    """
    found = [(module._parameters, name) for module in modules for name in module._parameters]
    shards = [(own, name, own[name]) for own, name in found if is_dtensor(own[name])]
    try:
        for own, name, shard in shards:
            own[name] = full_tensor(shard.detach())  # type: ignore[union-attr,assignment]
        yield
    finally:
        for own, name, shard in shards:
            own[name] = shard


def on_first_rank(tensors: Iterable[Tensor], act: Callable[[], T]) -> T:
    """Call `act` on the first process that has shards of these tensors, while the other processes wait.

    Without shards, every caller calls `act`. All processes get the result, or the error, of the first process.
    """
    mesh: Any = next((tensor.device_mesh for tensor in tensors if is_dtensor(tensor)), None)  # type: ignore[attr-defined]
    if mesh is None:
        return act()
    told: list[Any] = [None, None]
    if not any(mesh.get_coordinate()):
        try:
            told[0] = act()
        except Exception as error:
            told[1] = error
    for group in mesh.get_all_groups():  # one for each dimension: first down the first column, then along all rows
        torch.distributed.broadcast_object_list(told, torch.distributed.get_global_rank(group, 0), group)
    if told[1] is not None:
        raise told[1]
    return cast(T, told[0])
