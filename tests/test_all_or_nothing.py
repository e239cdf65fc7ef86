"""An error anywhere in `transform`, up to its very last step, leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from adapting import config, mlp, picture
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import UnsupportedLayerError


class ReadsThroughAName(nn.Module):
    """Reads the weight of `a` by `getattr`, which no look at the source finds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.linear(x, getattr(getattr(self, "a"), "weight")))  # noqa: B009


def test_refusal_during_capture_leaves_the_model_as_it_was() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branching, self.late = Branching(), ReadsThroughAName()

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.branching(x))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) if x.sum() > 0 else x

    model = Whole()
    model.late.a.weight.requires_grad_(False)
    before = picture(model)
    with pytest.raises(UnsupportedLayerError, match=r"late\.a: late \(ReadsThroughAName\) reads its weight directly"):
        hra_fx.transform(model, config("mlp.0", "mlp.1", "a", "b"))
    assert picture(model) == before
    hra_fx.transform(model, config("mlp.0", "mlp.1", "b"))


def test_refusal_of_the_last_layer_leaves_the_first_as_it_was() -> None:
    model = nn.Sequential(*mlp(), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = picture(model)
    with pytest.raises(UnsupportedLayerError, match=r"^4 \(Linear\): Gram-Schmidt"):
        hra_fx.transform(model, config("0", "3", "4", apply_GS=True))
    assert picture(model) == before


def test_refusal_after_layers_and_regions_are_rewritten_leaves_nothing() -> None:
    """The model refuses the attribute in which `transform` keeps its record: the very last step fails."""

    class Sealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.sealed = True

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

        def __setattr__(self, name: str, value: object) -> None:
            if vars(self).get("sealed") and name == "_hra_record":
                raise RuntimeError("sealed")
            super().__setattr__(name, value)

    model = Sealed()
    model.body[0].bias.requires_grad_(False)
    before = picture(model)
    with pytest.raises(RuntimeError, match="sealed"):
        hra_fx.transform(model, config("0", "3"))
    assert picture(model) == before
    assert model(torch.randn(2, 6)).shape == (2, 4)


class Stubborn(nn.Parameter):
    """A parameter whose flag cannot be set, as that of a lazy module."""

    def requires_grad_(self, requires_grad: bool = True) -> Stubborn:
        raise RuntimeError("stubborn")


def test_an_error_while_flags_are_set_gives_them_back() -> None:
    model = mlp()
    model[3].weight = Stubborn(model[3].weight.detach())
    before = picture(model)
    with pytest.raises(RuntimeError, match="stubborn"):
        hra_fx.transform(model, config("0"))
    assert picture(model) == before
