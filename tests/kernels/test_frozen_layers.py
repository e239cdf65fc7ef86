"""Adapted layers with frozen weights: properties of every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_layer import BF16, F32, F64, adapted, normal
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn

import hra_fx

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda **options: nn.Linear(48, 24, **options), (2, 3, 48)),
    "Linear, many rows": (lambda **options: nn.Linear(48, 24, **options), (2, 300, 48)),
    "Conv2d": (lambda **options: nn.Conv2d(16, 24, 3, **options), (2, 16, 7, 7)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def frozen(name: str, dtype: torch.dtype = F64, **options: Any) -> tuple[Any, Tensor]:
    """A model of one layer of which the vectors alone are trained, and an input."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = adapted(make(dtype=dtype), **{"r": 4, **options}).requires_grad_(False)
    model[0].hra_u["default"].requires_grad_()
    return model, normal(1, *shape, dtype=dtype)


def oracle(model: Any, x: Tensor) -> Tensor:
    layer = model[0]
    box = layer.hra_u
    weight = dense_weight(layer.hra_base, dense_q(box["default"], anchor=box.anchor("default")))
    bias = layer.bias.double()
    if isinstance(layer, nn.Conv2d):
        output: Tensor = layer._conv_forward(x.double(), weight, bias)
        return output
    return nn.functional.linear(x.double(), weight, bias)


CHANGES: dict[str, Callable[[Any], object]] = {
    "trained weight": lambda layer: layer.hra_base.requires_grad_(),
    "trained bias": lambda layer: layer.bias.requires_grad_(),
    "hook": lambda layer: layer.hra_u.register_forward_hook(lambda *_: None),
}


@layers
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_of_a_trained_layer_and_with_a_hook(name: str, change: str) -> None:
    model, x = frozen(name)
    CHANGES[change](model[0])
    output, wanted = model(x), oracle(model, x)
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    upstream = normal(2, *output.shape)
    found, sought = (torch.autograd.grad(one, asked, upstream) for one in (output, wanted))
    for one, other in zip(found, sought, strict=True):
        assert relative_error(one, other) < 1e-10


@layers
def test_outputs_can_be_modified_in_place(name: str) -> None:
    model, x = frozen(name)
    vectors = model[0].hra_u["default"]
    output, plain = model(x), oracle(model, x)
    output[:, 0] = 0
    output.add_(1).relu_()
    wanted = (torch.cat([torch.zeros_like(plain[:, :1]), plain[:, 1:]], dim=1) + 1).relu()
    assert relative_error(output, wanted) < 1e-12
    found, sought = (torch.autograd.grad(one.sum(), vectors)[0] for one in (output, wanted))
    assert relative_error(found, sought) < 1e-10


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_the_same_bits_with_and_without_gradients(name: str, dtype: torch.dtype) -> None:
    """So that a loaded adapter can be compared with the saved one."""
    model, x = frozen(name, dtype)
    trained = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), trained)
    if name == "Linear":
        assert torch.equal(model.requires_grad_(False)(x), trained)


@layers
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(name: str, autocast: bool) -> None:
    model, x = frozen(name, BF16)
    vectors = model[0].hra_u["default"]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        output = model(x)
    assert vectors.dtype == F32
    wanted = oracle(model, x)
    assert relative_error(output, wanted) < 6e-3
    upstream = normal(2, *output.shape, dtype=BF16)
    found = torch.autograd.grad(output, vectors, upstream)[0]
    assert relative_error(found, torch.autograd.grad(wanted, vectors, upstream.double())[0]) < 6e-3


@layers
def test_changes_without_gradients_are_noticed(name: str) -> None:
    model, x = frozen(name)
    layer, box = model[0], model[0].hra_u
    vectors, fresh = box["default"], normal(7, *box["default"].shape)
    ways: list[Callable[[], object]] = [
        lambda: vectors.copy_(2 * fresh + 1),
        lambda: vectors.data.copy_(fresh),  # as weight averaging does; does not change the version
        lambda: vectors.data.numpy().__setitem__((0, 0), 5.0),
        lambda: setattr(vectors, "data", normal(8, *fresh.shape)),
        lambda: model.load_state_dict({**model.state_dict(), "0.hra_u.default": normal(9, *fresh.shape)}),
        lambda: layer.hra_base.data.copy_(normal(10, *layer.hra_base.shape)),
    ]
    with torch.no_grad():
        model(x)
        for way in ways:
            before = oracle(model, x)
            way()
            assert relative_error(before, oracle(model, x)) > 1e-3
            assert relative_error(model(x), oracle(model, x)) < 1e-12
        hra_fx.set_scale(model, "default", 0.0)
        plain = layer._conv_forward if isinstance(layer, nn.Conv2d) else nn.functional.linear
        assert relative_error(model(x), plain(x, layer.hra_base, layer.bias)) < 1e-14
        hra_fx.set_scale(model, "default", 1.0)
        assert relative_error(model(x), oracle(model, x)) < 1e-12


@layers
def test_a_removed_anchor_is_noticed(name: str) -> None:
    """The same vectors, loaded without their anchor."""
    model, x = frozen(name, r=3, init_weights=True)
    box = model[0].hra_u
    with torch.no_grad():
        anchored = model(x)
        assert relative_error(anchored, oracle(model, x)) < 1e-12
        box.replace("default", box["default"].clone(), None, box["default"].device)
        assert box.anchor("default") is None
        assert relative_error(model(x), oracle(model, x)) < 1e-12
        assert relative_error(anchored, oracle(model, x)) > 1e-3
