"""What `reporting.scale` computes, against what two processes hold and send."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from integrations.distributed.spawned import WORLD, Check
from integrations.distributed.trained import (
    LAYERS,
    PROJECTIONS,
    Case,
    llama,
    loss_of,
    shard,
    sites,
    tokens,
    vectors,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import hra_fx
from hra_fx.layers.sharding import local_tensor
from hra_fx.reporting.scale import Cost, Strategy, costs

#: Operator -> the argument that holds what all processes have together, and how often a ring sends it.
OPERATORS = {"_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1), "allreduce_": (0, 2)}


class Traffic(TorchDispatchMode):
    """Counts the collectives of this process, and what a ring sends for them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = defaultdict(int)
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            self.counts[name] += 1
            place, times = OPERATORS.get(name, (0, 0))
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            whole = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
            self.sent += times * whole * (WORLD - 1) // WORLD
            if name == "broadcast_":
                self.sent += whole
        return func(*args, **(kwargs or {}))


def hra_model(case: Case, r: int) -> nn.Module:
    torch.manual_seed(0)
    return hra_fx.transform(case.make(), hra_fx.HRAConfig(**{**case.config, "r": r}))


def step(model: nn.Module, case: Case) -> Traffic:
    """The third step: DDP has its final buckets by then."""
    x, labels = case.data()
    x = x.float() if x.is_floating_point() else x
    for _ in range(3):
        with Traffic() as traffic:
            loss_of(model(x), labels).backward()
    return traffic


def memory(model: nn.Module) -> dict[str, int]:
    """What this process holds of the adapters after a step, with AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    buffers = [buffer for name, buffer in model.named_buffers() if ".hra_u." in name]
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    sizes = {"vectors": [*trained, *buffers], "gradients": [p.grad for p in trained], "optimizer": moments}
    return {name: sum(local_tensor(t).nbytes for t in tensors) for name, tensors in sizes.items()}


LLAMA = Case(llama, tokens, PROJECTIONS, LAYERS)
#: Nine input features: shards of five and four rows.
UNEVEN = Case(
    lambda: nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 3)), vectors, {"target_modules": ["0", "2"]}, ()
)
CASES_OF_SCALE = {"llama": LLAMA, "uneven": UNEVEN}
WRAPS: dict[Strategy, Callable[[Case, nn.Module], nn.Module]] = {
    "ddp": lambda case, model: DistributedDataParallel(model),
    "fsdp2": lambda case, model: shard(model, case.units),
    "zero3": lambda case, model: shard(model, sites(model)),
}


def lora_model(case: Case, r: int) -> nn.Module:
    """PEFT's LoRA of the same layers and rank."""
    config = peft.LoraConfig(r=r, target_modules=case.config["target_modules"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers has renamed
        return peft.get_peft_model(case.make(), config)  # type: ignore[arg-type]


def measured(case: Case, r: int, strategy: Strategy, rank: int, *, lora: bool = False) -> tuple[Cost, Traffic]:
    """Computed and counted; what is held must be equal, in the process with the largest shards."""
    cost = costs(hra_model(case, r).to("meta"), WORLD, strategy)[1 if lora else 0]
    if lora:
        units = tuple(f"base_model.model.{unit}" for unit in case.units)
        model = WRAPS[strategy](dataclasses.replace(case, units=units), lora_model(case, r))
    else:
        model = WRAPS[strategy](case, hra_model(case, r))
    traffic = step(model, case)
    if rank == 0:
        assert memory(model) == {name: getattr(cost, name) for name in ("vectors", "gradients", "optimizer")}
    return cost, traffic


def sharded(rank: int, folder: Path) -> None:
    """The bytes of the base model are those that do not depend on the rank of adapters."""
    for name, case in CASES_OF_SCALE.items():
        for strategy in ("fsdp2", "zero3"):
            (low, few), (odd, some), (high, many) = (measured(case, r, strategy, rank) for r in (4, 3, 8))
            gathers = 1 if name == "llama" else 0  # of the root, which has no adapters there
            for cost, traffic in ((low, few), (odd, some), (high, many)):
                assert cost.collectives == sum(traffic.counts.values()) - gathers, (name, strategy)
            assert high.sent - low.sent == many.sent - few.sent, (name, strategy)
            assert low.sent - odd.sent == few.sent - some.sent, (name, strategy)


def replicated(rank: int, folder: Path) -> None:
    """With anchors, which are buffers, there is one more broadcast, unless the base model has buffers too."""
    for name, case in CASES_OF_SCALE.items():
        for r in (3, 4, 8):
            cost, traffic = measured(case, r, "ddp", rank)
            others = [buffer.nbytes for path, buffer in case.make().named_buffers()]
            assert cost.sent == traffic.sent - sum(others), (name, r)
            assert traffic.counts["allreduce_"] == 1
            assert cost.collectives == sum(traffic.counts.values()) - (bool(others) and r != 3), (name, r)


def lora(rank: int, folder: Path) -> None:
    """Of rank 1, the second process has no row of `A`, and sends as much."""
    for strategy in ("ddp", "fsdp2"):
        found = [measured(LLAMA, r, strategy, rank, lora=True) for r in (1, 4, 8)]
        for cost, traffic in found:
            # The gather of the root, or the broadcast of its buffers, is the base model's.
            assert cost.collectives == sum(traffic.counts.values()) - 1, (strategy, cost.rank)
        for (low, few), (high, many) in itertools.pairwise(found):
            assert high.sent - low.sent == many.sent - few.sent, (strategy, low.rank)


CHECKS: dict[str, Check] = {"sharded": sharded, "replicated": replicated, "LoRA": lora}
