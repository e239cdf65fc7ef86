"""A model frees what it no longer needs: classes, replaced layers, factors."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import config
from layers.checking import assert_same, normal, pair, run_dense
from torch import Tensor, nn

import hra_fx

X = normal(1, 3, 6)


def two_outputs() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(torch.tanh(self.body(x)))

    return Net()


@pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
def test_the_class_of_a_model_and_what_it_closes_over_are_freed(way: Callable[..., Any]) -> None:
    def made() -> tuple[nn.Module, list[weakref.ref[Any]]]:
        large = torch.ones(6)

        class Layer(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * large

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = Layer(6, 6), nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.first(x * large))

        return Net(), [weakref.ref(one) for one in (large, Layer, Net)]

    model, references = made()
    model = way(model, config("first", "last"))
    model(X.float()).sum().backward()
    model = hra_fx.fold(model)
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_a_layer_that_was_replaced_is_freed() -> None:
    base, model = pair(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), "0|2")
    model(X)
    removed = weakref.ref(model[2])
    model[2], base[2] = nn.Identity(), nn.Identity()
    gc.collect()
    assert removed() is None
    wanted = run_dense(base, model, X).detach()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert_same(same(X), wanted)
        assert_same(hra_fx.fold(same)(X), wanted)


def tensors() -> set[int]:
    gc.collect()
    return {id(one) for one in gc.get_objects() if issubclass(type(one), Tensor)}


def test_the_backward_pass_frees_the_factors_while_the_loss_is_kept() -> None:
    _, model = pair(two_outputs, "body|left|right")
    model(X)[0].sum().backward()
    model.zero_grad(set_to_none=False)
    before = tensors()
    loss = sum(output.sum() for output in model(X))
    loss.backward()
    assert tensors() <= before | {id(loss), *(id(parameter.grad) for parameter in model.parameters())}


def test_backward_passes_over_parts_of_a_batch() -> None:
    """One after the other, again over a kept graph, and an error over one that was freed, as without adapters."""
    base, model = pair(two_outputs, "body|left|right")
    left, right = model(X)
    wanted_left, wanted_right = run_dense(base, model, X)
    parts = [(left, wanted_left, ["left"]), (right, wanted_right, ["body", "right"])]
    for keep in (True, False):
        for output, wanted, paths in parts:
            vectors = [model.get_submodule(path).hra_u["default"] for path in paths]
            found = torch.autograd.grad(output.square().sum(), vectors, retain_graph=keep)
            for mine, oracle in zip(
                found, torch.autograd.grad(wanted.square().sum(), vectors, retain_graph=True), strict=True
            ):
                assert_same(mine, oracle)
    with pytest.raises(RuntimeError, match="second time"):
        right.sum().backward()


def test_backward_passes_over_two_calls_of_a_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), self.body(y)

    base, model = pair(Twice, "body")
    vectors = model.body.hra_u["default"]
    for output, wanted in zip(model(X, 2 * X), run_dense(base, model, X, 2 * X), strict=True):
        (found,) = torch.autograd.grad(output.square().sum(), vectors)
        assert_same(found, torch.autograd.grad(wanted.square().sum(), vectors, retain_graph=True)[0])
    first, second = model(X, 2 * X)
    first.sum().backward()
    with torch.no_grad():
        vectors.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        second.sum().backward()
