"""The class of an adapted model, called for a new object: a plain model of the base class, which runs."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.checking import dense_weights, normal, run_dense
from named_models import tiny_llama
from oracles import relative_error
from torch import Tensor, nn

import hra_fx

ways = pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
Way = Callable[..., Any]
X = normal(1, 3, 6)


class Net(nn.Module):
    """A model with arguments: `(n, 6) -> (n, 4)`."""

    def __init__(self, width: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.first(x)))


def config(*targets: str) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(r=2, target_modules=list(targets), init_weights=False)


@ways
def test_a_slice_of_an_adapted_sequential_runs_its_adapted_layers(way: Way) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    model = way(copy.deepcopy(base), config("0", "2"))
    whole = model(X)
    hidden = torch.relu(nn.functional.linear(X, dense_weights(base, model)["0.weight"], base[0].bias))
    first, last = model[:2], model[2:]
    assert (len(first), len(last)) == (2, 1)
    assert relative_error(first(X), hidden) < 1e-12
    assert relative_error(last(first(X)), whole) < 1e-12
    # The slice shares the layers, and the model is unchanged.
    assert first[0] is model[0]
    assert torch.equal(model(X), whole)


class Abstract(Net, ABC):
    """A model whose class has a metaclass of its own."""


@ways
@pytest.mark.parametrize("kind", [Net, Abstract])
def test_the_class_of_an_adapted_model_makes_a_plain_one_which_can_be_adapted(way: Way, kind: type[Net]) -> None:
    model = way(kind(4), config("first"))
    torch.manual_seed(3)
    built = type(model)(5, scale=2.0).double()
    torch.manual_seed(3)
    plain = kind(5, scale=2.0).double()
    assert type(built) is kind and torch.equal(built(X), plain(X))
    with pytest.raises(TypeError, match="width"):
        type(model)()
    adapted = way(built, config("first"))
    assert relative_error(adapted(X), run_dense(plain, adapted, X)) < 1e-12


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.MultiheadAttention])
def test_the_class_of_an_adapted_layer_makes_a_plain_layer(kind: Any) -> None:
    sizes = (6, 2, 1) if kind is nn.Conv2d else (6, 2)
    model = nn.ModuleDict({"layer": kind(*sizes), "other": nn.Linear(6, 2)})
    hra_fx.transform(model, config("layer"))
    assert type(type(model["layer"])(*sizes)) is kind


@ways
def test_the_class_of_a_model_of_transformers_loads_base_models(way: Way, tmp_path: Path) -> None:
    plain = tiny_llama()
    plain.save_pretrained(tmp_path)
    model = way(copy.deepcopy(plain), config("q_proj"))
    for loaded in (type(model).from_pretrained(tmp_path), model.from_pretrained(tmp_path)):
        assert type(loaded) is type(plain)
        assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))
