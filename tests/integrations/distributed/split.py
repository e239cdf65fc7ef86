"""Small models whose Linear layers are split over processes, in the two orders with `transform`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from integrations.distributed import trained
from integrations.distributed.trained import CASES, Case, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

Plan = dict[str, Callable[[], ParallelStyle]]


#: With weights that are large enough for a wrong product to be seen in the loss.
llama = partial(trained.llama, num_key_value_heads=2, initializer_range=0.3)


def uneven() -> nn.Module:
    """Nine hidden features: one process has five of them, the other four."""
    return nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 3))


def sequences(count: int) -> Tensor:
    return torch.randn(count, 6, 8, dtype=torch.float64)


class Positions(nn.Module):
    """Two pairs of layers; between them, each process may have some of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.up_again, self.down_again = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        hidden = self.down(self.up(x).tanh()).relu()
        return self.down_again(self.up_again(hidden).tanh()).mean(1)


PAIR: Plan = {"0": ColwiseParallel, "2": RowwiseParallel}
GATHERED = {"4": lambda: ColwiseParallel(output_layouts=Replicate())}
LLAMA: Plan = {
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    **{f"model.layers.*.mlp.{name}_proj": ColwiseParallel for name in ("gate", "up")},
    **{f"model.layers.*.{name}": RowwiseParallel for name in ("self_attn.o_proj", "mlp.down_proj")},
    "lm_head": lambda: ColwiseParallel(output_layouts=Replicate()),
}
POSITIONS: Plan = {
    "up": lambda: ColwiseParallel(use_local_output=False),
    "down": lambda: RowwiseParallel(output_layouts=Shard(1)),
    "up_again": lambda: ColwiseParallel(input_layouts=Shard(1)),
    "down_again": RowwiseParallel,
}


@dataclasses.dataclass(frozen=True)
class Split:
    """A case, and what of it is split."""

    case: Case
    plan: Mapping[str, Callable[[], ParallelStyle]]

    def apply(self, model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
        whole = init_device_mesh("cpu", (2,)) if mesh is None else mesh
        return parallelize_module(model, whole, {path: style() for path, style in self.plan.items()})

    def after(self, mesh: DeviceMesh | None = None) -> nn.Module:
        """Adapted, then split."""
        return self.apply(self.case.model(), mesh)

    def before(self, mesh: DeviceMesh | None = None) -> nn.Module:
        """Split, then adapted."""
        base = dataclasses.replace(self.case, make=lambda: self.apply(self.case.make().to(torch.float64), mesh))
        return base.model()


def _changed(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


_PROJECTIONS = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
SPLITS = {
    "mlp": Split(CASES["mlp, whole"], {**PAIR, **GATHERED}),
    "odd rank": Split(CASES["mlp, odd rank"], {**PAIR, **GATHERED}),
    "Gram-Schmidt": Split(CASES["mlp, Gram-Schmidt"], PAIR),
    "Gram-Schmidt without anchor": Split(CASES["mlp, Gram-Schmidt without anchor"], PAIR),
    "biases": Split(_changed(CASES["mlp, whole"], config={"bias": "hra_only", "target_modules": ["0", "2"]}), PAIR),
    "copies": Split(CASES["mlp, copies"], PAIR),
    "uneven": Split(
        _changed(CASES["mlp, whole"], make=uneven, config={"target_modules": ["0", "2"]}),
        # torch computes the size of a local input as if all processes had as much.
        {**PAIR, "0": lambda: ColwiseParallel(use_local_output=False)},
    ),
    "positions": Split(Case(Positions, sequences, {"target_modules": list(POSITIONS)}, ()), POSITIONS),
    "llama": Split(Case(llama, tokens, _PROJECTIONS, ()), LLAMA),
    "llama, checkpointing": Split(Case(lambda: llama(checkpointing=True), tokens, _PROJECTIONS, ()), LLAMA),
}
