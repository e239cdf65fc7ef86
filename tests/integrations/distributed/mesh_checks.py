"""FSDP2 over tensor parallelism, in a mesh of two times two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from integrations.distributed.adapter_checks import close, turned_away
from integrations.distributed.spawned import Check
from integrations.distributed.split import SPLITS, Split
from integrations.distributed.trained import output, same, train, trained
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import hra_fx
from hra_fx.errors import AdapterError, FoldError, UnsupportedLayerError

WORLD = 4
UNITS = {"mlp": ["0", "2"], "Gram-Schmidt": ["0"], "odd rank": ["2"], "llama": ["model.layers.0", "model.layers.1"]}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def sharded(name: str, model: nn.Module, over: DeviceMesh) -> nn.Module:
    for unit in UNITS[name]:
        fully_shard(model.get_submodule(unit), mesh=over["data"])
    return fully_shard(model, mesh=over["data"])


def both_orders(split: Split, over: DeviceMesh) -> list[nn.Module]:
    """Adapted before and after it is split; sharded last."""
    return [order(split, over["tensor"]) for order in (Split.after, Split.before)]


def losses_and_vectors(rank: int, folder: Path) -> None:
    over = mesh()
    part = slice(over["data"].get_local_rank(), None, 2)
    for name in UNITS:
        alone, case = SPLITS[name].case.model(), SPLITS[name].case
        losses = train(alone, case)
        for model in both_orders(SPLITS[name], over):
            assert train(sharded(name, model, over), case, part) == pytest.approx(losses, abs=1e-12), name
            same(trained(alone), trained(model), within=1e-12)


def files_and_checkpoints(rank: int, folder: Path) -> None:
    over = mesh()
    for name in UNITS:
        case = SPLITS[name].case
        for number, model in enumerate(both_orders(SPLITS[name], over)):
            sharded(name, model, over)
            place, state = folder / f"{name} {number}", folder / f"{name} {number} state"
            hra_fx.save_adapter(model, place)
            torch.distributed.barrier()
            same(trained(case.model()), trained(hra_fx.load_adapter(case.base(), place, is_trainable=True)))
            other = turned_away(sharded(name, SPLITS[name].after(over["tensor"]), over))
            same(trained(case.model()), trained(hra_fx.load_adapter(other, place, is_trainable=True)))
            dcp.save(get_model_state_dict(model), checkpoint_id=state)
            other = turned_away(sharded(name, SPLITS[name].after(over["tensor"]), over))
            into = get_model_state_dict(other)
            dcp.load(into, checkpoint_id=state)
            set_model_state_dict(other, into)
            same(trained(case.model()), trained(other))


def refused(rank: int, folder: Path) -> None:
    over = mesh()
    model = sharded("mlp", SPLITS["mlp"].after(over["tensor"]), over)
    case = SPLITS["mlp"].case
    with pytest.raises(FoldError, match="fully_shard shards its parameters"):
        hra_fx.fold(model)
    with pytest.raises(UnsupportedLayerError, match="fully_shard has already sharded it"):
        hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match="Add and remove adapters before sharding"):
        hra_fx.delete_adapter(model, "default")
    assert close(model, case, output(case.model(), case))


CHECKS: dict[str, Check] = {
    "losses and vectors": losses_and_vectors,
    "files and checkpoints": files_and_checkpoints,
    "refused": refused,
}
