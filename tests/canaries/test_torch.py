"""What hra_fx reads of torch. What `hra_fx.compat` asks about a call or a tensor is in `tests/test_versions.py`."""

from __future__ import annotations

import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from canaries.canary import canary
from canaries.one_process import mesh_of_one
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import hra_fx
from hra_fx import compat
from hra_fx.model.unwrap import unwrap

in_compat = functools.partial(canary, "torch", reader="hra_fx/compat.py")
X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0"]))


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


@pytest.mark.parametrize(
    "operation", [lambda model: model(X), hra_fx.fold, lambda m: hra_fx.delete_adapter(m, "default")]
)
def test_a_layer_that_was_split_in_part_is_refused(operation: Callable[[Any], object]) -> None:
    def fail(name: str, module: nn.Module, mesh: object) -> None:
        raise ValueError("out of memory")

    model: Any = adapted()
    with mesh_of_one() as mesh:
        with pytest.raises(ValueError, match="out of memory"):
            distribute_module(model[0], mesh, fail)
        with pytest.raises(hra_fx.HRAError, match=r"Linear 3->4: parallelize_module failed.* Build the model again"):
            operation(model)


@canary(
    "torch",
    "`_fsdp_flattened` of the parameters that FSDP1 flattens",
    reader="hra_fx/layers/adapted_layer.py",
    breaks="FullyShardedDataParallel of a model with adapters: it would flatten the rotated weight",
)
def test_fsdp_1() -> None:
    model: Any = adapted()
    expected, base = model(X), model[0].hra_base.detach().clone()
    with mesh_of_one():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process gets NO_SHARD, which is deprecated
            wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        assert torch.allclose(wrapped(X), expected, rtol=1e-12)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            assert torch.equal(model[0].hra_base, base)


@in_compat("`_checkpoint_wrapped_module`", breaks="names of layers and files under activation checkpointing")
def test_activation_checkpointing() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(3, 2))))
    paths = [path for path, _ in compat.state_modules(model)]
    assert paths == ["", "0", "0.0"]
    assert {key.rpartition(".")[0] for key in model.state_dict()} == {"0.0"}


@in_compat("`_orig_mod` and the module of the class `OptimizedModule`", breaks="every function on a compiled model")
def test_a_compiled_model() -> None:
    model = adapted()
    assert unwrap(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]


@canary(
    "torch",
    "`_tracer_cls` of a graph, by which it is traced again when it is unpickled",
    reader="hra_fx/tracing/tracer.py",
    breaks="pickles and copies of traced models: the buffers that they read would be constants",
)
def test_a_pickled_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("shift", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shifted: torch.Tensor = self.layer(x) + self.shift
            return shifted

    model = hra_fx.transform(Model(), hra_fx.HRAConfig(r=2, target_modules=["layer"]), trace=True)
    loaded: Any = pickle.loads(pickle.dumps(model))
    assert "shift" in [node.target for node in loaded.graph.nodes if node.op == "get_attr"]


@in_compat("`_is_replica`", breaks="models in nn.DataParallel")
def test_a_replica() -> None:
    model: Any = nn.Linear(3, 2)
    assert not compat.is_replica(model)
    assert compat.is_replica(model._replicate_for_data_parallel())
