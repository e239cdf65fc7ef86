"""FSDP2 over tensor parallelism, in a mesh of two times two processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from integrations.distributed.common_checks import Way, checkpoints, files, losses_and_vectors
from integrations.distributed.spawned import Check
from integrations.distributed.split import SPLITS, Split
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

WORLD = 4
UNITS = {"mlp": ["0", "2"], "Gram-Schmidt": ["0"], "odd rank": ["2"], "llama": ["model.layers.0", "model.layers.1"]}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def sharded(name: str, model: nn.Module, over: DeviceMesh) -> nn.Module:
    for unit in UNITS[name]:
        fully_shard(model.get_submodule(unit), mesh=over["data"])
    return fully_shard(model, mesh=over["data"])


def ways() -> dict[str, Way]:
    """Adapted before and after it is split; sharded last."""
    over = mesh()
    part = slice(over["data"].get_local_rank(), None, 2)
    return {
        f"{name}, {order.__name__}": Way(
            SPLITS[name].case, functools.partial(made, name, order, over), part, takes_full_state=False
        )
        for name in UNITS
        for order in (Split.after, Split.before)
    }


def made(name: str, order: Callable[..., nn.Module], over: DeviceMesh) -> nn.Module:
    return sharded(name, order(SPLITS[name], over["tensor"]), over)


def in_mesh(check: Any, rank: int, folder: Path) -> None:
    check(ways(), rank, folder)


CHECKS: dict[str, Check] = {
    check.__name__: functools.partial(in_mesh, check) for check in (losses_and_vectors, files, checkpoints)
}
