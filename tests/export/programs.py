"""Small models, captured, and what holds for every program that was transformed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapting import config as config, randomise
from one_layer import F64 as F64, normal as normal
from oracles import dense_q
from torch import Tensor, nn
from torch.export import ExportedProgram

import hra_fx
from hra_fx.export.captured import transform_captured

#: torch warns of its own copies of tree specifications, in saving and in run_decompositions.
QUIET = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
BATCH = torch.export.Dim.DYNAMIC


class Mixed(nn.Module):
    """An embedding that is tied to the head, two blocks, a convolution and a buffer."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6, dtype=dtype)
        self.blocks = nn.ModuleList([nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, bias=False, dtype=dtype)])
        self.conv = nn.Conv2d(1, 4, 3, padding="same", dtype=dtype)
        self.head = nn.Linear(6, 10, bias=False, dtype=dtype)
        self.head.weight = self.emb.weight
        self.register_buffer("shift", torch.ones(6, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.emb(ids)
        for block in self.blocks:
            hidden = block(hidden).relu()
        seen = self.conv(hidden[:, None]).mean(1)
        logits: Tensor = self.head(hidden + self.shift + seen)
        return logits


def mixed(seed: int = 0, dtype: torch.dtype = F64) -> tuple[Mixed, Tensor]:
    torch.manual_seed(seed)
    return Mixed(dtype), torch.randint(0, 10, (3, 5))


def capture(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """The model's program, for any batch size."""
    return torch.export.export(model, inputs, dynamic_shapes=tuple({0: BATCH} for _ in inputs))


def adapted(program: ExportedProgram, settings: hra_fx.HRAConfig) -> ExportedProgram:
    """The transformed program at random vectors."""
    made = transform_captured(program, settings, "default")
    randomise(made)
    return made


def q_of(program: ExportedProgram, path: str, settings: hra_fx.HRAConfig) -> Tensor:
    """The dense matrix of a layer's adapter; the anchor is taken for what the program says it is."""
    name = f"{path}.hra_u.default"
    vectors, anchor = program.state_dict[name], program.state_dict.get(f"{name}_anchor")
    return dense_q(vectors.detach(), apply_GS=settings.apply_GS, anchor=anchor)


def with_dense_weights(
    model: nn.Module,
    program: ExportedProgram,
    settings: hra_fx.HRAConfig,
    turn: Callable[[Tensor, Tensor], Tensor] = lambda weight, q: (weight.flatten(1) @ q).view_as(weight),
) -> None:
    """Put `W Q`, from dense matrices, in place of the weight of every adapted layer of a float64 model."""
    for name in list(program.state_dict):
        path, found, _ = name.partition(".hra_u.")
        if found and not name.endswith("_anchor"):
            layer = model.get_submodule(path)
            key = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
            turned = turn(layer._parameters[key].detach(), q_of(program, path, settings))  # type: ignore[union-attr]
            layer._parameters[key] = nn.Parameter(turned)


def picture(program: ExportedProgram) -> list[object]:
    """All of a program that a transform could change."""
    nodes = [(node.name, node.op, str(node.args), dict(node.meta)) for node in program.graph.nodes]
    state = [(name, id(tensor), tensor.requires_grad, tensor._version) for name, tensor in program.state_dict.items()]
    return [nodes, state, str(program), str(program.graph_signature), dict(program.graph_module.meta)]
