"""The first forward in each mode is watched: a weight that is read unseen raises, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.checking import assert_same, check, run_dense
from refusals import picture
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from unseen import Alias, Asking, Untraceable, X, adapted, multiply, watching

import hra_fx
from hra_fx.errors import UnsupportedLayerError
from hra_fx.model.state import record_of


class Subscript(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._modules["first"].weight)


class Loop(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        for part in (self.first,):
            x = multiply(x, part.weight)
        return x


class HandedOver(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return self.reader(x, self.first)


class Transposed(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return x @ layer.weight.T


class Data(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return nn.functional.linear(x, weight=layer.weight.data)


class Converted(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return nn.functional.linear(x, layer.weight.to(x.dtype, copy=True))


class InAList(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return torch.block_diag(*[layer.weight])[: len(x)] + x


class Sliced(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return torch.cat([x[:, :3] @ layer.weight[:3, :3], x[:, 3:]], dim=1)


READERS = [
    (Alias, "the model (Alias, in linear)"),
    (Subscript, "the model (Subscript, in linear)"),
    (Loop, "the model (Loop, in mT)"),
    (HandedOver, "reader (Reader, in linear)"),
    (Transposed, "the model (Transposed, in T)"),
    (Data, "the model (Data, in data)"),
    (Converted, "the model (Converted, in to)"),
    (InAList, "the model (InAList, in block_diag)"),
    (Sliced, "the model (Sliced, in __getitem__)"),
]


@pytest.mark.parametrize(("make", "reader"), READERS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_read_that_no_source_shows_raises_at_the_first_forward(make: Any, reader: str, mode: bool) -> None:
    _, model = adapted(make())
    before = picture(model.train(mode))
    for _ in range(2):  # also when it is tried again
        with pytest.raises(UnsupportedLayerError) as caught:
            model(X)
        assert str(caught.value) == (
            f"first: {reader} reads its weight, and neither a source nor a graph told so: its reflections act on what "
            "it is called with, and are not seen there. Take the adapters off (hra_fx.delete_adapter for each), and "
            "give hra_fx.transform or load_adapter example_inputs, a call in this mode, which shows the read: the "
            "weight is reflected then."
        )
    assert watching() == 0
    model.modes = 0
    assert [part for part in picture(model)[1] if part not in before[1]] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [make for make, _ in READERS if make is not Data])
def test_with_an_example_the_weight_is_reflected_there_too(make: Any) -> None:
    base, model = adapted(make(), example_inputs=X)
    check(base, model, X)


def test_a_read_of_data_has_the_reflected_weight_and_no_gradient_there() -> None:
    base, model = adapted(Data(), example_inputs=X)
    assert_same(model(X), run_dense(base, model, X))


@pytest.mark.parametrize("take", [lambda layer: layer._parameters["weight"], lambda layer: next(layer.parameters())])
def test_a_read_past_the_attribute_is_refused_with_and_without_an_example(take: Callable[[Any], Tensor]) -> None:
    class Past(Untraceable):
        def extra(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, take(self.first))

    for options in ({}, {"example_inputs": X}):
        _, model = adapted(Past(), **options)
        with pytest.raises(UnsupportedLayerError) as caught:
            model(X)
        assert str(caught.value).startswith("first: the model (Past, in linear) reads its weight")
    assert str(caught.value).endswith(
        "past the attribute, as _parameters or parameters() give it, where no reflection can be seen. Take the "
        "adapters off (hra_fx.delete_adapter for each), and leave the layer out with exclude_modules."
    )


class Copied(Untraceable):
    """Another layer holds the same parameter, and reads its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)
        self.table.weight = self.first.weight

    def extra(self, x: Tensor) -> Tensor:
        return x + self.table(torch.tensor([0, 1, 2, 3]))


class Checkpointed(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return checkpoint(
            self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=torch.is_grad_enabled()
        )


class CallsItself(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return self(x * 0 + 1) if float(x.detach().abs().min()) < 1e-9 else x


class CatchesErrors(Untraceable):
    """Goes on where a child failed, its own hook among the causes."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_pre_hook(self.forbid)

    @staticmethod
    def forbid(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[-1] != 6:
            raise ValueError("not six")

    def extra(self, x: Tensor) -> Tensor:
        for wrong in (x[:, :5], x[:, :4]):
            try:
                x = self.first(wrong)
            except ValueError:
                x = self.second(x)
        return x


QUIET = [Untraceable, Asking, Copied, Checkpointed, CallsItself, CatchesErrors]


@pytest.mark.parametrize("make", QUIET)
def test_no_false_alarm(make: Any) -> None:
    base, model = adapted(make())
    for mode in (True, False):
        with torch.no_grad():
            assert_same(model.train(mode)(X), run_dense(base, model, X))
    assert record_of(model).looked == {True, False}
    model(X.clone().requires_grad_()).sum().backward()
    assert model.first.hra_u["default"].grad is not None


def test_it_runs_once_a_mode_and_changes_not_a_bit() -> None:
    _, model = adapted(Untraceable())
    for mode in (True, False, True, False):
        model.train(mode)
        torch.manual_seed(0)
        first = model(X)
        torch.manual_seed(0)
        assert torch.equal(first, model(X))
    assert model.modes == 2
    model.train()
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["second", "reader.*|first"][:1]))
    for _ in range(2):
        model(X)
        hra_fx.set_adapter(model, "other")
        model(X)
    assert model.modes == 3 or record_of(model).looked == {True, False}


def test_a_new_adapter_with_new_layers_is_watched_again() -> None:
    model = Untraceable().double()
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["second"]))
    model(X), model.eval()(X)
    model.extra = Alias.extra.__get__(model)
    model(X)
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["first"]))
    with pytest.raises(UnsupportedLayerError, match=r"first: the model \(Untraceable, in linear\) reads its weight"):
        model(X)


def test_a_forward_that_fails_leaves_nothing_behind_and_the_next_one_is_watched() -> None:
    _, model = adapted(Alias())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(X[:, :5])
        assert watching() == 0 and record_of(model).looked == set()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with pytest.raises(UnsupportedLayerError):
        model(X)


def test_a_trace_is_no_forward_and_the_next_one_is_watched() -> None:
    _, model = adapted(Alias())
    with pytest.raises(TypeError, match="not 'Proxy'"):
        fx.symbolic_trace(model)
    with pytest.raises(UnsupportedLayerError):
        model(X)


def test_norms_that_a_user_computes_outside_of_the_forward() -> None:
    base, model = adapted(Untraceable())
    decay = sum(parameter.square().sum() for parameter in model.parameters())
    model(X).sum().backward()
    decay = decay + model.first.weight.norm() + (model.first.weight.T @ X.T).sum()
    assert torch.isfinite(decay)
    assert_same(model(X), run_dense(base, model, X))


def test_an_adapter_that_needs_an_example_loads_with_one(tmp_path: Path) -> None:
    base, model = adapted(Alias(), example_inputs=X)
    hra_fx.save_adapter(model, tmp_path)
    refused = hra_fx.load_adapter(copy.deepcopy(base), tmp_path)
    with pytest.raises(UnsupportedLayerError, match="load_adapter example_inputs"):
        refused(X)
    loaded = hra_fx.load_adapter(copy.deepcopy(base), tmp_path, example_inputs=X)
    assert_same(loaded(X), model.eval()(X))
