"""Guard: what a proxy hides from Python: names of one tensor, keys of sets, kinds of containers, values for a while."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any

import pytest
import torch
from capture.checks import adapt, assert_equals_oracle, assert_refused, assert_whole, fresh, inputs, naive
from capture.models import Two
from torch import Tensor, nn

import hra_fx

X = inputs(4, 6)


class Augmented(Two):
    """Writes into a tensor that another name holds too."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        skip = hidden
        hidden *= 0.5
        return self.second(hidden) + skip.sum()


class AugmentedNumber(Two):
    """The same of a number, which has no other names."""

    def forward(self, x: Tensor) -> Any:
        count = x.shape[0]
        before = count
        count += 1
        return self.second(self.first(x)) * before / count


def test_naive_trace_loses_the_other_name() -> None:
    base = fresh(Augmented())
    assert (naive(base)(X) - base(X)).abs().max() > 0.1


@pytest.mark.parametrize("model", [Augmented, AugmentedNumber])
def test_augmented_assignment_writes_into_the_tensor(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)


class InSet(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * (2.0 if x.shape[0] in {3, 4} else 1.0)


class InDictionary(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * {4: 2.0}.get(x.shape[0], 1.0)


class IsDtype(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * (2.0 if x.dtype is torch.float64 else 1.0)


class IsOther(Two):
    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        same = hidden.contiguous()
        return self.second(hidden) * (1.0 if same is not hidden else 2.0)


class AsksDefault(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * (2.0 if torch.get_default_dtype() == torch.float32 else 1.0)


class ForAWhile(Two):
    """Monte Carlo dropout: another mode of a child for one call."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        mode = self.drop.training
        self.drop.training = True
        hidden = self.drop(self.first(x))
        self.drop.training = mode
        return self.second(hidden)


class Ordered(Two):
    def forward(self, x: Tensor) -> Any:
        return collections.OrderedDict(out=self.second(self.first(x)))


@dataclasses.dataclass
class Result:
    out: Any


class Dataclass(Two):
    def forward(self, x: Tensor) -> Any:
        return Result(self.second(self.first(x))).out * 1.0


REFUSED = [
    (InSet, "it looks a value up in a set or dictionary"),
    (InDictionary, "it looks a value up in a set or dictionary"),
    (IsDtype, "it asks whether a value is the same object"),
    (IsOther, "it asks whether a value is the same object"),
    (AsksDefault, "it asks for a setting of the process"),
    (ForAWhile, "its forward sets 'training' for a while"),
    (Ordered, "it makes or returns a OrderedDict"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[model.__name__ for model, _ in REFUSED])
def test_what_a_proxy_hides_refuses_the_region(model: type[nn.Module], reason: str) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, reason)
    assert_equals_oracle(adapted, base, X)


def test_a_dataclass_that_does_not_leave_is_no_trouble() -> None:
    adapted, base = adapt(Dataclass())
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)


class Scaled(Two):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.rate


def test_a_shallow_copy_goes_its_own_way() -> None:
    adapted, _ = adapt(Scaled())
    wanted = 5 * adapted(X)
    twin = copy.copy(adapted)
    twin.rate = 5.0
    assert torch.allclose(twin(X), wanted, rtol=1e-12)
    assert torch.allclose(adapted(X), wanted / 5, rtol=1e-12)


def test_a_child_named_by_a_keyword_is_a_region_of_its_own() -> None:
    model = nn.ModuleDict({"class": nn.Linear(6, 5), "other": nn.Linear(5, 4)}).double()

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Any:
            return self.parts["other"](self.parts["class"](x))

    adapted, base = adapt(Host())
    assert_refused(adapted, "no code can hold the name 'parts.class'")
    assert_equals_oracle(adapted, base, X)
    assert set(hra_fx.graphs(adapted)) == {"parts.class", "parts.other"}


def test_parts_that_are_folded_one_by_one_leave_a_plain_model() -> None:
    adapted, _ = adapt(Two())
    before = adapted(X).detach()
    hra_fx.fold(adapted.first)
    assert set(hra_fx.graphs(adapted)) == {"second"} == {row.path for row in hra_fx.report(adapted)}
    assert torch.allclose(adapted(X), before, atol=1e-12, rtol=0)
    hra_fx.fold(adapted.second)
    hra_fx.fold(adapted)
    assert type(adapted) is Two and all(parameter.requires_grad for parameter in adapted.parameters())
    assert torch.allclose(adapted(X), before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_a_weight_that_cannot_be_written_is_refused_before_any_is(kind: str) -> None:
    model = Two().double()
    with torch.inference_mode(kind == "inference"):
        row = torch.randn(1, model.second.in_features, dtype=torch.float64)
        weight = row.expand(model.second.out_features, -1)
        model.second.weight = nn.Parameter(weight if kind == "expanded" else weight.clone(), requires_grad=False)
    adapted, _ = adapt_as_it_is(model)
    before = adapted.first.weight.clone()
    with pytest.raises(hra_fx.FoldError, match="second: its weight cannot be written"):
        hra_fx.fold(adapted)
    assert torch.equal(adapted.first.weight, before)
    assert len(hra_fx.report(adapted)) == 2


def adapt_as_it_is(model: nn.Module) -> tuple[Any, None]:
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["first", "second"], init_weights=False))
    return model, None
