"""An error anywhere in `transform`, up to its very last step, leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from adapting import config, mlp, picture
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import UnsupportedLayerError
from hra_fx.model.root import RootCarrier


def test_refusal_of_the_last_layer_leaves_the_first_as_it_was() -> None:
    model = nn.Sequential(*mlp(), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = picture(model)
    with pytest.raises(UnsupportedLayerError, match=r"^4 \(Linear\): Gram-Schmidt"):
        hra_fx.transform(model, config("0", "3", "4", apply_GS=True))
    assert picture(model) == before


def test_refusal_after_all_layers_are_rewritten_leaves_nothing() -> None:
    """The class of the model refuses the subclass that keeps its state right: the very last step fails."""

    class Sealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def __init_subclass__(cls) -> None:
            if issubclass(cls, RootCarrier):
                raise TypeError("sealed")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Sealed()
    model.body[0].bias.requires_grad_(False)
    before = picture(model)
    with pytest.raises(
        UnsupportedLayerError, match=r"^Sealed: no subclass can be made of it \(sealed\)\. Leave it out"
    ):
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
