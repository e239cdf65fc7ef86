"""Carriers: an adapted module goes by the names of its class, and gets that class back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from layers.checking import check, normal, pair
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


def test_signature_of_forward_stays() -> None:
    import inspect

    adapted, base = adapt(Stack)
    assert inspect.signature(type(adapted).forward) == inspect.signature(type(base).forward)
    assert type(adapted).forward.__doc__ == type(base).forward.__doc__
    assert inspect.signature(adapted.stem.forward) == inspect.signature(base.stem.forward)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle(protocol: int) -> None:
    adapted, base = adapt(Stack)
    again = pickle.loads(pickle.dumps(adapted, protocol))
    assert type(again) is type(adapted) and again is not adapted
    check(base, again, X)


def test_a_module_with_a_reduce_of_its_own() -> None:
    adapted, base = adapt(Reduces)
    for again in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert type(again) is type(adapted) and again.restored == adapted.restored + 1
        check(base, again, X)


class Reduces(Two):
    """Restores itself by way of `__setstate__`."""

    def __init__(self) -> None:
        super().__init__()
        self.restored = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.restored += 1


def test_a_part_that_is_saved_alone() -> None:
    adapted, _ = adapt(Stack)
    for path in ("stem", "blocks.0", "blocks"):
        file = io.BytesIO()
        torch.save(adapted.get_submodule(path), file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        part = adapted.get_submodule(path)
        assert type(again) is type(part)
        assert again.state_dict().keys() == part.state_dict().keys()
        if path != "blocks":
            x = normal(7, 3, 6 if path == "stem" else 8)
            assert torch.equal(again.eval()(x), part.eval()(x))
