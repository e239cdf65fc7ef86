"""A transformed GraphModule in use: copies and pickles, adapters, files, other tracers, and inside of other models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_modules import COPIES, IMAGES, Cnn, Mlp, X, adapted, check_folded, config, targets_of, traced, untyped
from layers.checking import assert_same, check, randomise, run_dense
from torch import Tensor, fx, nn

import hra_fx


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(
    ("make", "example", "targets"),
    [(Mlp, X, ["first", "second"]), (Cnn, IMAGES, ["conv", "grouped", "first"])],
    ids=["mlp", "cnn"],
)
def test_copies_and_pickles_are_adapted_and_on_their_own(
    copied: Callable[[Any], Any], make: Any, example: Tensor, targets: list[str]
) -> None:
    base, model = adapted(make, *targets)
    twin = copied(model)
    check(copy.deepcopy(base), copy.deepcopy(twin), example)
    hra_fx.add_adapter(twin, "other", config("first", r=2))
    hra_fx.set_adapter(twin, "other")
    with hra_fx.disable_adapters(twin):
        assert_same(twin.eval()(example), base.eval()(example))
    hra_fx.set_adapter(twin, "default")
    hra_fx.delete_adapter(twin, "other")
    check_folded(base, twin, example)
    assert not [target for target in targets_of(twin) if "hra_u" in target]
    check(copy.deepcopy(base), model, example)


def test_several_adapters() -> None:
    base, model = adapted(Mlp, "first")
    hra_fx.add_adapter(model, "other", config("second", r=2))
    randomise(model, 5)
    assert len(targets_of(model)) == 8
    hra_fx.set_adapter(model, ["default", "other"])
    assert_same(model(X), run_dense(base, model, X, adapters=("default", "other")))
    hra_fx.set_adapter(model, "other")
    assert_same(model(X), run_dense(base, model, X, adapters=("other",)))
    with hra_fx.disable_adapters(model):
        assert_same(model(X), base(X))
    hra_fx.merge_adapter(model)
    assert_same(model(X), run_dense(base, model, X, adapters=("other",)))
    hra_fx.unmerge_adapter(model)
    hra_fx.set_adapter(model, "default")
    hra_fx.delete_adapter(model, "other")
    assert [target for target in targets_of(model) if "second.hra_u" in target] == []
    check(base, model, X)
    assert [row.path for row in hra_fx.report(model)] == ["first"]
    check_folded(base, model, X)


def test_the_last_adapter_deleted_leaves_the_graph_that_there_was() -> None:
    base, model = adapted()
    hra_fx.delete_adapter(model, "default")
    assert model.code == base.code and list(model.state_dict()) == list(base.state_dict())
    assert_same(model(X), base(X))
    assert all(p.requires_grad for p in model.parameters())
    hra_fx.transform(model, config("first"))
    randomise(model)
    check(base, model, X)


def test_biases_and_modules_to_save_are_trained() -> None:
    base, model = adapted(Cnn, "conv", bias="all", modules_to_save=["first"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.eval()(IMAGES)["out"].square().sum().backward()
    optimizer.step()
    trained = model(IMAGES)["out"].detach()
    with hra_fx.disable_adapters(model):
        assert_same(model(IMAGES), base.eval()(IMAGES))
    folded = hra_fx.fold(model)
    assert_same(folded(IMAGES)["out"], trained)
    assert folded.code == base.code and list(folded.state_dict()) == list(base.state_dict())
    assert not torch.equal(folded.first.weight, base.first.weight)


class Blocks(fx.Tracer):
    """Does not look into a Sequential."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Sequential) or super().is_leaf_module(m, module_qualified_name)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.block(x) + x)


def test_a_custom_tracer_whose_leaves_hold_layers() -> None:
    torch.manual_seed(0)
    root = Nested().double()
    base = untyped(fx.GraphModule(root, Blocks().trace(root)))
    model = hra_fx.transform(copy.deepcopy(base), config("block.0", "block.2", "first"))
    randomise(model)
    assert targets_of(model) == ["block", "first.hra_u", "first"]
    check(base, model, X)
    for copied in COPIES:
        check(base, copied(model), X)
    check_folded(base, model, X)


def test_a_graph_module_inside_of_a_bigger_model() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = traced(Cnn)
            self.second = nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.inner(x)["out"])

    torch.manual_seed(0)
    base = Holder()
    model = hra_fx.transform(copy.deepcopy(base), config("inner.conv", "inner.first", "second"))
    randomise(model)
    check(base, model, IMAGES)
    for copied in COPIES[:1]:
        check(base, copied(model), IMAGES)
    before = model.eval()(IMAGES)
    assert_same(hra_fx.fold(model)(IMAGES), before)
    assert model.inner.code == base.inner.code and list(model.state_dict()) == list(base.state_dict())
