"""An adapted module goes by the names of its class, and gets that class back; new objects of the class are plain."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.checking import check, dense_weights, normal, pair
from named_models import tiny_llama
from oracles import relative_error
from torch import Tensor, nn
from tracing.models import Two

import hra_fx
from hra_fx.layers.class_swap import original_class
from hra_fx.model.state import adapted_layers

X = normal(7, 4, 6)


class Block(nn.Module):
    """A residual block, 8 -> 8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Add what the block makes of `x`."""
        return x + scale * self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """A stem, blocks in a list, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Convolutions(nn.Module):
    """Two convolutions, a norm, a layer with a forward of its own, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.own, self.attn = Doubled(6, 6), nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.conv2(torch.relu(self.norm(self.conv1(x)))).mean(dim=(2, 3)))
        return self.attn(x, x, x, need_weights=False)[0]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


def adapt(make: type[nn.Module]) -> tuple[Any, Any]:
    """An adapted model, every layer of it, and what it was before."""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    base, model = pair(make, [name for name, part in make().named_modules() if isinstance(part, kinds)])
    return model, base


class Special(nn.Linear):
    """A subclass of a Linear that keeps its forward."""

    class Nested(nn.Linear):
        """With a qualified name."""


class Specials(Two):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Special(6, 8), Special.Nested(8, 5)


@pytest.mark.parametrize("make", [Two, Stack, Convolutions, Specials])
def test_names_and_classes_with_adapters_and_after_a_fold(make: type[nn.Module]) -> None:
    adapted, base = adapt(make)
    swapped = 0
    for (name, before), part in zip(
        base.named_modules(), (adapted.get_submodule(n) for n, _ in base.named_modules()), strict=True
    ):
        old, new = type(before), type(part)
        assert isinstance(part, old) and issubclass(new, old)
        assert (new.__name__, new.__qualname__, new.__module__, new.__doc__) == (
            old.__name__,
            old.__qualname__,
            old.__module__,
            old.__doc__,
        )
        assert str(new) == str(old) and repr(new) == repr(old)
        assert original_class(part) is old, name
        assert part._get_name() == before._get_name()
        swapped += new is not old
    assert swapped == len({*adapted_layers(adapted), ""})
    assert adapted.extra_repr() == base.extra_repr()
    hra_fx.fold(adapted)
    for part, before in zip(adapted.modules(), base.modules(), strict=True):
        assert type(part) is type(before) and vars(part).keys() == vars(before).keys()


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_every_protocol_of_pickle(protocol: int) -> None:
    adapted, base = adapt(Stack)
    again = pickle.loads(pickle.dumps(adapted, protocol))
    assert type(again) is type(adapted) and again is not adapted
    check(base, again, X)


# ---- new objects of adapted classes ----

ways = pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
Way = Callable[..., Any]


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


@ways
def test_the_class_of_a_model_of_transformers_loads_base_models(way: Way, tmp_path: Path) -> None:
    plain = tiny_llama()
    plain.save_pretrained(tmp_path)
    model = way(copy.deepcopy(plain), config("q_proj"))
    for loaded in (type(model).from_pretrained(tmp_path), model.from_pretrained(tmp_path)):
        assert type(loaded) is type(plain)
        assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))
