"""Private structures of torch and transformers. `tests/test_versions.py` tests the private functions of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from canaries.canary import canary
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import hra_fx

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0"]))


@contextmanager
def mesh_of_one() -> Iterator[DeviceMesh]:
    """A mesh of one process, in which the code of several processes runs."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # or later tests would look for the group


@pytest.mark.needs("torch>=2.9")
@canary(
    "torch",
    "`_distribute_module_applied`, which `distribute_module` reads first and sets last",
    reader="hra_fx/layers/adapted_layer.py",
    breaks="parallelize_module of a model with adapters",
)
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_tensor_parallelism(style: type[ParallelStyle]) -> None:
    model: Any = adapted()
    expected = model(X)
    with mesh_of_one() as mesh:
        parallelize_module(model, mesh, {"0": style()})
        assert isinstance(model[0].hra_base, DTensor)
        assert not any(isinstance(vectors, DTensor) for vectors in model[0].hra_u.parameters())
        assert torch.allclose(model(X), expected, rtol=1e-12)


@pytest.mark.needs("torch>=2.9")
@pytest.mark.parametrize(
    "operation", [lambda model: model(X), hra_fx.fold, lambda m: hra_fx.delete_adapter(m, "default")]
)
def test_a_layer_that_was_split_in_part_is_refused(operation: Callable[[Any], object]) -> None:
    def fail(name: str, module: Any, mesh: Any) -> None:
        module.register_parameter("weight", nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)])))
        raise ValueError("out of memory")

    model: Any = adapted()
    with mesh_of_one() as mesh:
        with pytest.raises(ValueError, match="out of memory"):
            distribute_module(model[0], mesh, fail)
        with pytest.raises(hra_fx.HRAError, match=r"Linear 3->4: parallelize_module failed.* Build the model again"):
            operation(model)
