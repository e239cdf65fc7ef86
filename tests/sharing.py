"""Models that contain a layer in several places, and the oracle for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from oracles import dense_q, dense_weight
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM

import hra_fx
from hra_fx.model.state import adapted_layers

F64 = torch.float64


class Pair(nn.Module):
    """Two layers, of which another parent has the second too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared(torch.tanh(self.own(x))))


class TwoPaths(nn.Module):
    """A parent that has and calls a layer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.between = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.between(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


class OtherPathOnly(TwoPaths):
    """Only the later name is called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.between(torch.tanh(x))))  # type: ignore[no-any-return]


class TwoParents(nn.Module):
    """Two traced parents share a layer under a root that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.left, self.right = Pair(shared), Pair(shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        if bool(x.sum() > 1e9):
            return x
        return self.right(x)  # type: ignore[no-any-return]


class SharedBlock(nn.Module):
    """A block that is called three times in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Pair(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return x


class SharedBlocks(nn.Module):
    """A list that holds one block twice, and another between."""

    def __init__(self) -> None:
        super().__init__()
        block = Pair(nn.Linear(6, 6))
        self.layers = nn.ModuleList([block, Pair(nn.Linear(6, 6)), block])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class SharedConv(nn.Module):
    """A convolution by two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.last = self.first
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.tanh(self.first(x.view(-1, 2, 3, 1))))
        return self.out(x.repeat(1, 1, 1, 3).flatten(2))[:, 0]  # type: ignore[no-any-return]


def albert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "embedding_size": 8, "num_attention_heads": 2}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=32, num_hidden_layers=3, max_position_embeddings=32, **sizes))


class Case(NamedTuple):
    """A model, its `target_modules`, and the paths of the adapted layers."""

    make: Callable[[], nn.Module]
    targets: list[str]
    sites: list[str]


_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
CASES = {
    "two paths": Case(TwoPaths, ["first", "between"], ["first", "between"]),
    "two paths, both named": Case(TwoPaths, ["first", "again"], ["first"]),
    "the other path only": Case(OtherPathOnly, ["first", "between"], ["first", "between"]),
    "two parents": Case(TwoParents, ["own", "shared"], ["left.own", "left.shared", "right.own"]),
    "two parents, shared alone": Case(TwoParents, ["shared"], ["left.shared"]),
    "a block called three times": Case(SharedBlock, ["own", "shared"], ["block.own", "block.shared"]),
    "a list with a block twice": Case(
        SharedBlocks, ["own", "shared"], ["layers.0.own", "layers.0.shared", "layers.1.own", "layers.1.shared"]
    ),
    "a convolution": Case(SharedConv, ["first", "out"], ["first", "out"]),
    "albert": Case(
        albert,
        ["query", "ffn", "ffn_output"],
        [f"{_ALBERT}.attention.query", f"{_ALBERT}.ffn", f"{_ALBERT}.ffn_output"],
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().to(F64).eval()


def config(name: str, **fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**{"r": 3, "target_modules": CASES[name].targets, **fields})


def turn(model: nn.Module, seed: int = 4) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for vectors in layer.hra_u.values():
                vectors.copy_(torch.randn(vectors.shape, dtype=vectors.dtype, generator=generator))


def adapted(name: str) -> tuple[nn.Module, Any]:
    plain = base(name).requires_grad_(False)
    model = hra_fx.transform(base(name), config(name))
    turn(model)
    return plain, model


def x_of(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "albert":
        return torch.randint(0, 32, (2, 5), generator=generator)
    return torch.randn(4, 6, dtype=F64, generator=generator)


def run(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return getattr(output, "logits", output)


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the vectors of every adapted layer, to be trained by the oracle."""
    return {
        path: layer.hra_u["default"].detach().clone().requires_grad_() for path, layer in adapted_layers(model).items()
    }


def oracle(plain: nn.Module, model: nn.Module, x: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    """The base model over `W Q`, by the dense product, differentiable in the vectors."""
    twin = copy.deepcopy(plain)
    for path, layer in adapted_layers(model).items():
        part, q = twin.get_submodule(path), dense_q(vectors[path], anchor=layer.hra_u.anchor("default"))
        # functional_call does not restore the weight of a layer that has two paths.
        weight = part._parameters.pop("weight")
        assert weight is not None
        vars(part)["weight"] = dense_weight(weight, q)
    return run(twin, x)
