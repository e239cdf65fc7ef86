"""An error anywhere in `transform`, up to its very last step, leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from adapting import config, mlp, picture
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import UnsupportedLayerError
from hra_fx.model.root import RootCarrier


def in_any_order(model: nn.Module) -> dict[str, object]:
    """The picture of a model that has a region and a record already, which are put aside for a trace and put back."""
    found = picture(model)
    return found | {"vars": sorted(found["vars"])}  # type: ignore[type-var]


def test_refusal_after_capture_leaves_the_model_as_it_was() -> None:
    """A layer whose input is reflected, and whose weight is read by the time that a second adapter comes."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.reads = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return nn.functional.linear(x, getattr(self.a, "weight")) if self.reads else x  # noqa: B009

    model = Growing()
    model.a.weight.requires_grad_(False)
    hra_fx.transform(model, config("a"))
    model.reads = True
    before = in_any_order(model)
    with pytest.raises(UnsupportedLayerError, match=r"^a: the model \(Growing, at node .*\) reads its weight by now"):
        hra_fx.add_adapter(model, "other", config("a", "b"))
    assert in_any_order(model) == before
    hra_fx.fold(model)
    hra_fx.transform(model, config("a", "b"))


def test_refusal_of_the_last_layer_leaves_the_first_as_it_was() -> None:
    model = nn.Sequential(*mlp(), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = picture(model)
    with pytest.raises(UnsupportedLayerError, match=r"^4 \(Linear\): Gram-Schmidt"):
        hra_fx.transform(model, config("0", "3", "4", apply_GS=True))
    assert picture(model) == before


def test_refusal_after_layers_and_regions_are_rewritten_leaves_nothing() -> None:
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
