"""Tensor parallelism, also under FSDP2: losses, gradients and files are those of one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.distributed.common_checks import (
    EVERY,
    PLAIN,
    Way,
    as_lora,
    checkpoints,
    close,
    files,
    losses_and_vectors,
)
from integrations.distributed.spawned import Check
from integrations.distributed.split import SPLITS, Split
from integrations.distributed.trained import output, same, train, trained
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import hra_fx
from hra_fx.errors import FoldError, UnsupportedLayerError

MLP, LLAMA = SPLITS["mlp"], SPLITS["llama"]
ORDERS = (Split.after, Split.before)
#: Biases that are split already cannot be copied.
COPIES = ("biases", "copies")


def collectives(rank: int, folder: Path) -> None:
    """In numbers, of each process: those of the layer itself, and what the adapters add."""
    tokens, k, d, out = 8, 4, 16, 16
    for style, width, own_forward, own_backward, forward, backward in (
        (ColwiseParallel, d, [], [tokens * d], [], []),
        (RowwiseParallel, d // 2, [tokens * out], [], [tokens * k], [tokens * k, 2 * k * d // 2]),
    ):
        for has_adapter in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(d, out, bias=False).double())
            if has_adapter:
                hra_fx.transform(model, hra_fx.HRAConfig(r=k, init_weights=False, target_modules=["0"]))
            parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": style()})
            x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
            with Sent() as sent:
                y = model(x)
            assert sorted(sent.numbers) == sorted(own_forward + (forward if has_adapter else []))
            with Sent() as sent:
                y.sum().backward()
            assert sorted(sent.numbers) == sorted(own_backward + (backward if has_adapter else []))


class Sent(CommDebugMode):
    """The number of elements that this process gives to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            self.numbers.append(args[0].numel())
        return found


def several_adapters(rank: int, folder: Path) -> None:
    """Adapters are added, trained, combined, scaled, disabled and deleted in a model that is split already."""
    case, results = MLP.case, []
    for model in (case.model(), MLP.after(), MLP.before()):
        torch.manual_seed(5)
        hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
        hra_fx.set_adapter(model, ["b", "default"])
        found = [output(model, case), torch.tensor(train(model, case))]
        hra_fx.set_scale(model, "b", 0.5)
        found.append(output(model, case))
        hra_fx.set_adapter(model, "b")
        found.append(output(model, case))
        hra_fx.set_adapter(model, "default")
        hra_fx.delete_adapter(model, "b")
        found.append(output(model, case))
        with hra_fx.disable_adapters(model):
            found.append(output(model, case))
        results.append(found)
    for other in results[1:]:
        assert all((one - two).abs().max() < 1e-12 for one, two in zip(results[0], other, strict=True))


def reported(rank: int, folder: Path) -> None:
    """By one process alone: vectors are whole, and the share of a weight that is split is not known."""
    model, alone = MLP.after(), MLP.case.model()
    if rank == 1:
        for row, wanted in zip(hra_fx.report(model).rows, hra_fx.report(alone).rows, strict=True):
            assert (row.rotation, row.angle, row.r) == (wanted.rotation, wanted.angle, wanted.r)
            assert row.share != row.share
        hra_fx.visualize(model, folder / "model.svg")
        assert repr(model[0].weight) and model[0].weight.shape == (16, 8)  # type: ignore[index]


def vectors_of_the_first(rank: int, folder: Path) -> None:
    """Processes that drew other vectors get those of the first, as they get its weights."""
    config = hra_fx.HRAConfig(r=3, target_modules=["0", "2"])
    for order in ("after", "before"):
        model = MLP.case.base()
        torch.manual_seed(rank)
        if order == "before":
            MLP.apply(model)
        hra_fx.transform(model, config)
        if order == "after":
            MLP.apply(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if ".hra_u." in name}
        assert len(state) == 4
        every: list[Any] = [None, None]
        torch.distributed.all_gather_object(every, state)
        same(every[0], every[1], within=1e-300)


def refused(rank: int, folder: Path) -> None:
    """What needs whole weights; the model is as it was."""
    case = MLP.case
    wanted = output(case.model(), case)
    for order in ORDERS:
        model = order(MLP).eval()
        names = [name for name, _ in model.named_parameters()]
        message = r"^0: tensor parallelism shards its parameters.*Save the adapter"
        for call in (hra_fx.fold, hra_fx.plan_fold, hra_fx.merge_adapter):
            with pytest.raises(FoldError, match=message):
                call(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert close(model, case, wanted)


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def refused_layers(rank: int, folder: Path) -> None:
    """A layer that cannot be split, or adapted once it is, named in the message; the model is as it was."""
    mesh = init_device_mesh("cpu", (2,))
    own = nn.Sequential(OwnForward(8, 4, bias=False)).double()
    config = hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0"])
    x = torch.randn(5, 8, dtype=torch.float64)
    model = hra_fx.transform(own, config)
    wanted = model(x)
    message = r"^Linear 8->4: tensor parallelism supports only adapted nn\.Linear layers, got OwnForward\. Leave it out"
    with pytest.raises(UnsupportedLayerError, match=message):
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    assert (model(x) - wanted).abs().max() == 0
    convolution = hra_fx.transform(nn.Sequential(nn.Conv2d(2, 4, 3)), config)
    with pytest.raises(UnsupportedLayerError, match=r"^Conv2d 2->4 3x3: .* got Conv2d\. Leave it out of the plan"):
        distribute_module(convolution[0], mesh)
    split = parallelize_module(nn.Sequential(OwnForward(8, 4, bias=False)), mesh, {"0": ColwiseParallel()})
    with pytest.raises(UnsupportedLayerError, match=r"^0 \(OwnForward\): tensor parallelism .* Exclude the layer"):
        hra_fx.transform(split, config)
    assert not hasattr(split[0], "hra_u")
    with pytest.raises(UnsupportedLayerError, match=r"^0 \(Linear\): its bias is a DTensor, which cannot be copied"):
        SPLITS["biases"].before()


def loaded(folder: Path, rank: int, plan: str | dict[str, str] = "auto") -> Any:
    """A Llama that transformers splits while it loads it."""
    if rank == 0:
        LLAMA.case.base().save_pretrained(folder / "base")  # type: ignore[operator]
    torch.distributed.barrier()
    config = DistributedConfig(tp_size=2, tp_plan=plan)
    return LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config, dtype=torch.float64)


def transformers_plan(rank: int, folder: Path) -> None:
    """`tp_plan`: with gradients transformers passes DTensors to a layer, without gradients local tensors."""
    case, alone = LLAMA.case, LLAMA.case.model()
    x, _ = case.data()
    wanted, losses = output(alone, case), train(alone, case)
    tokens = alone.generate(x, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    plan = {
        "model.layers.*.mlp.down_proj": "rowwise_split_input",
        "model.layers.*.mlp.up_proj": "colwise_gather_output",
    }
    for given in ("auto", {**plan, "model.layers.*.mlp.gate_proj": "colwise_gather_output"}):
        model = dataclasses.replace(case, make=functools.partial(loaded, folder, rank, given)).model()
        assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj").hra_base, DTensor)
        assert close(model, case, wanted)
        with hra_fx.disable_adapters(model):
            assert close(model, case, output(case.base(), case))
        assert train(model, case) == pytest.approx(losses, abs=1e-12)
        same(trained(alone), trained(model), within=1e-12)
        assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False), tokens)  # type: ignore[operator]
        hra_fx.save_adapter(model, folder / "adapter")
        torch.distributed.barrier()
        assert close(hra_fx.load_adapter(case.base(), folder / "adapter"), case, output(alone, case))
        again = hra_fx.load_adapter(loaded(folder, rank, given), folder / "adapter")
        assert close(again, case, output(alone, case))
        hra_fx.delete_adapter(model, "default")
        assert close(model, case, output(case.base(), case))


def transformers_refused(rank: int, folder: Path) -> None:
    """Styles that split in another way; the model is as it was."""
    model = loaded(folder, rank, {"model.layers.*.mlp.up_proj": "packed_colwise"})
    before = model.model.layers[0].mlp.up_proj.forward
    with pytest.raises(
        UnsupportedLayerError, match=r"^model\.layers\.0\.mlp\.up_proj \(Linear\): its `forward` is set"
    ):
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert model.model.layers[0].mlp.up_proj.forward is before
    assert not any(".hra_u" in name for name, _ in model.named_modules())


def ways(names: Iterable[str], trainings: Any = (PLAIN,), orders: Any = ORDERS) -> dict[str, Way]:
    return {
        f"{name}, {order.__name__}": Way(SPLITS[name].case, functools.partial(order, SPLITS[name]), trainings=trainings)
        for name in names
        for order in orders
        if order is Split.after or name not in COPIES
    }


def losses(name: str, rank: int, folder: Path) -> None:
    trainings = {"mlp": EVERY, "llama": (PLAIN, {"pairs": True, "quiet": 2, "protect": 2})}.get(name, (PLAIN,))
    losses_and_vectors(ways([name], trainings), rank, folder)


def written(check: Any, names: Iterable[str], orders: Any, rank: int, folder: Path) -> None:
    check(ways(names, orders=orders), rank, folder)


CHECKS: dict[str, Check] = {
    **{f"losses and vectors: {name}": functools.partial(losses, name) for name in SPLITS},
    "files": functools.partial(written, files, list(SPLITS), ORDERS),
    "checkpoints": functools.partial(written, checkpoints, list(SPLITS), ORDERS[:1]),
    "as LoRA": functools.partial(written, as_lora, ["mlp"], ORDERS),
    **{"collectives": collectives, "several adapters": several_adapters, "reported": reported},
    "vectors of the first": vectors_of_the_first,
    **{"refused": refused, "refused layers": refused_layers},
    **{"transformers' plan": transformers_plan, "transformers, refused": transformers_refused},
}


#: In a mesh of two times two processes.
MESH_WORLD = 4
UNITS = {"mlp": ["0", "2"], "Gram-Schmidt": ["0"], "llama": ["model.layers.0", "model.layers.1"]}


def sharded(name: str, order: Callable[..., nn.Module], over: DeviceMesh) -> nn.Module:
    """Adapted before or after it is split; sharded last."""
    model = order(SPLITS[name], over["tensor"])
    for unit in UNITS[name]:
        fully_shard(model.get_submodule(unit), mesh=over["data"])
    return fully_shard(model, mesh=over["data"])


def in_mesh(check: Any, rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    part = slice(mesh["data"].get_local_rank(), None, 2)
    ways = {
        f"{name}, {order.__name__}": Way(
            SPLITS[name].case, functools.partial(sharded, name, order, mesh), part, takes_full_state=False
        )
        for name in UNITS
        for order in ORDERS
    }
    check(ways, rank, folder)


MESH_CHECKS: dict[str, Check] = {
    check.__name__: functools.partial(in_mesh, check) for check in (losses_and_vectors, files, checkpoints)
}
