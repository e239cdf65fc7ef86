"""Guard: questions about a value. fx answers them with a constant, and the branch of that answer becomes the graph."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from capture.checks import adapt, assert_equals_oracle, assert_refused, differ, fresh, inputs, naive
from capture.models import Two
from torch import Tensor, nn

import hra_fx

X = inputs(4, 6)


class IsInstance(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if isinstance(hidden, Tensor) else hidden)


class IsTuple(Two):
    """A question that has an answer for a tensor, of a value that is none."""

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x).chunk(2, dim=1)
        return self.second(torch.cat([halves[1], halves[0]], 1) * (2 if isinstance(halves, (tuple, list)) else 1))


class HasAttribute(Two):
    """True of any name, says a proxy."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden.last_hidden_state if hasattr(hidden, "last_hidden_state") else hidden * 2)


class GetAttribute(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        other = getattr(hidden, "logits", None)
        return self.second(hidden * 2 if other is None else hidden)


class Matches(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        match hidden:
            case Tensor():
                return self.second(hidden * 2)
        return self.second(hidden)


@functools.singledispatch
def doubled(value: object) -> object:
    return value


@doubled.register
def _(value: Tensor) -> Tensor:
    return value * 2


class Dispatches(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(doubled(self.first(x)))


class Caught(Two):
    """The model's own try swallows the refusal."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            hidden = hidden * (2 if isinstance(hidden, Tensor) else 5)
        except Exception:
            hidden = hidden * 3
        return self.second(hidden)


class Suppressed(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with contextlib.suppress(Exception):
            hidden = hidden.logits
        return self.second(hidden * 2)


class CaughtBranch(Two):
    """The same around a condition on a value, which fx itself refuses."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            if hidden.sum() == hidden.sum():
                hidden = hidden * 2
        except Exception:
            hidden = hidden * 3
        return self.second(hidden)


class CaughtLoop(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            for row in hidden:
                hidden = hidden + row
        except Exception:
            hidden = hidden * 3
        return self.second(hidden)


class IsTensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if torch.is_tensor(hidden) else hidden)


class TypeIs(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if type(hidden) is Tensor else hidden)


class SubclassOf(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if issubclass(type(hidden), Tensor) else hidden)


QUESTIONS: list[tuple[type[nn.Module], str]] = [
    (IsInstance, "it asks for the type of a value (isinstance)"),
    (IsTuple, "it asks for the type of a value (isinstance)"),
    (HasAttribute, "it reads 'last_hidden_state' of a value, which a tensor does not have"),
    (GetAttribute, "it reads 'logits' of a value, which a tensor does not have"),
    (Matches, "it asks for the type of a value (isinstance)"),
    (Dispatches, "it asks for the type of a value (isinstance)"),
    (Caught, "it asks for the type of a value (isinstance)"),
    (Suppressed, "it reads 'logits' of a value, which a tensor does not have"),
    (CaughtBranch, "it branches on a value"),
    (CaughtLoop, ""),
    (IsTensor, ""),
    (TypeIs, ""),
    (SubclassOf, ""),
]
IDS = [model.__name__ for model, _ in QUESTIONS]


@pytest.mark.parametrize(("model", "reason"), QUESTIONS, ids=IDS)
def test_a_question_about_a_value_refuses_the_region(model: type[nn.Module], reason: str) -> None:
    adapted, base = adapt(model())
    assert_equals_oracle(adapted, base, X)
    assert_refused(adapted, reason)


@pytest.mark.parametrize("model", [model for model, _ in QUESTIONS])
def test_naive_trace_takes_the_wrong_branch(model: type[nn.Module]) -> None:
    base = fresh(model())
    try:
        found = naive(base)(X)
    except AttributeError as error:
        assert "last_hidden_state" in str(error) or "logits" in str(error)
    else:
        assert differ(found, base(X))


class Metadata(Two):
    """What every tensor has may be asked for: it becomes nodes."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(self.first.weight.dtype))
        batch, width = hidden.shape
        hidden = hidden.view(batch, 2, -1).transpose(1, 2).reshape(batch, width).to(x.dtype)
        return self.second(hidden + torch.zeros_like(hidden)) * x.shape[0]


def test_shapes_and_dtypes_are_nodes() -> None:
    adapted, base = adapt(Metadata())
    assert hra_fx.report(adapted).rows[0].region == "whole"
    for batch in (4, 7):
        assert_equals_oracle(adapted, base, inputs(batch, 6))


class Branch(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if hidden.sum() > 0 else hidden)


def test_a_condition_on_a_value_refuses_the_region() -> None:
    adapted, base = adapt(Branch())
    assert_refused(adapted, "it branches on a value")
    for value in range(6):
        assert_equals_oracle(adapted, base, inputs(2, 6, value=value))
