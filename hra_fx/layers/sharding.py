"""Parameters that several processes hold together, each a shard of them: FSDP2 (`fully_shard`), tensor parallelism.

While a module of FSDP2 runs, its parameters are plain tensors, so that no reflection knows of shards. Outside of it
they are `DTensor`s, or still the plain ones, which are thrown away later: whoever changes a parameter, or keeps what he
reads, calls `reshard` before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def sharded_by(module: nn.Module) -> str | None:
    """Which tool shards the parameters of a module, if one does.

    Example:
        >>> sharded_by(nn.Linear(6, 4)) is None
        True
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if it is not loaded, nothing can be of its classes
    if fsdp is None:
        return None
    if isinstance(module, fsdp.FSDPModule):
        return "fully_shard"
    return "FullyShardedDataParallel" if isinstance(module, fsdp.FullyShardedDataParallel) else None


def first_sharded(model: nn.Module) -> tuple[str, str] | None:
    """Path of the first module whose parameters a tool shards, and which tool; `None` where there is none."""
    found = ((path or "the model", tool) for path, module in model.named_modules() if (tool := sharded_by(module)))
    return next(found, None)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process may hold a part of a tensor only.

    Example:
        >>> is_shard(nn.Linear(6, 4).weight)
        False
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def reshard(model: nn.Module) -> None:
    """Let every module of FSDP2 drop the whole parameters that it still has from its last forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # asked once, for a switch of adapters takes little more than that
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, which every process that holds one has to ask for; differentiable.

    Each process gets the gradient of its own shard, as if all of them computed the same.
    """
    gathered: Any = tensor
    return gathered.full_tensor() if is_shard(tensor) else tensor


def laid_out_as(values: Tensor, like: Tensor) -> Tensor:
    """Values that every process has, in the shards of `like`; nothing is sent."""
    if not is_shard(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    shards: Any = like
    values = values.to(like.device)
    return distribute_tensor(values, shards.device_mesh, shards.placements, src_data_rank=None)


def by_the_first(tensors: Iterable[Tensor], act: Callable[[], None]) -> None:
    """Act once: in the first of the processes that hold shards of these tensors, while the others wait for it.

    Where nothing is sharded, whoever calls acts. What the first one raises, all raise.
    """
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if is_shard(tensor)]  # type: ignore[attr-defined]
    if not meshes:
        act()
        return
    from torch import distributed

    outcome: list[Exception | None] = [None]
    if not any(meshes[0].get_coordinate()):
        try:
            act()
        except Exception as error:
            outcome[0] = error
    for group in meshes[0].get_all_groups():  # one for each dimension: first down the first column, then along all rows
        distributed.broadcast_object_list(outcome, distributed.get_global_rank(group, 0), group)
    if outcome[0] is not None:
        raise outcome[0]
