"""Questions about a value that have one answer: an assert, and whether a tensor is a list."""

from __future__ import annotations

import copy

import pytest
import torch
from capture.asserting import Asserts, Caught, CaughtAbove, Counted, Either, Falls, NotSo, Raises
from capture.checks import adapt, assert_equals_oracle, assert_refused, assert_whole, differ, inputs, spied
from capture.models import Convolutions, Two
from torch import Tensor, nn

import hra_fx

X = inputs(4, 6)


def test_an_assert_on_a_shape_is_a_node_that_raises() -> None:
    adapted, base = adapt(Asserts())
    assert_whole(adapted)
    spy = spied(adapted, X)
    for rows in (1, 4, 8):
        assert_equals_oracle(adapted, base, inputs(rows, 6))
    assert spy.runs == 9
    with pytest.raises(AssertionError, match="the assert in forward, line"):
        adapted(inputs(9, 6))
    with pytest.raises(AssertionError, match="the assert in forward, line"):
        adapted(inputs(2, 4, 6))
    assert spy.runs == 11
    for twin in (copy.deepcopy(adapted), hra_fx.graphs(adapted)[""]):
        with pytest.raises(AssertionError, match="the assert in forward, line"):
            twin(inputs(9, 6))


@pytest.mark.parametrize("model", [Caught, CaughtAbove, Either, NotSo, Raises, Falls, Counted])
def test_another_condition_is_a_branch(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, "it branches on a value")
    for rows in (2, 5):
        assert_equals_oracle(adapted, base, inputs(rows, 6))


class IsNoList(Two):
    """As coat, hrnet and hybrid models ask of what their features gave."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * 2 + self.first.bias
        if isinstance(hidden, list):
            hidden = hidden[0]
        if isinstance(x, (tuple, dict)):
            x = x[0]
        return self.second(hidden.flatten(1)[:, :]) + x[:, :5]


class ConvolutionsAsked(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = x[0] if isinstance(x, (list, tuple)) else x
        return self.fc(self.conv2(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(("model", "x"), [(IsNoList, X), (ConvolutionsAsked, inputs(2, 3, 6, 6))])
def test_a_tensor_is_no_list(model: type[nn.Module], x: Tensor) -> None:
    adapted, base = adapt(model())
    assert_whole(adapted)
    spy = spied(adapted, x)
    assert_equals_oracle(adapted, base, x)
    assert spy.runs == 3


class Chunks(Two):
    """`chunk` gives a tuple, which a traced value does not show."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).chunk(2, 1)
        return self.second(torch.cat([hidden[0], hidden[1]], 1) * (2 if isinstance(hidden, tuple) else 1))


class Largest(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).max(1, keepdim=True)
        return self.second(self.first(x) + hidden[0] * (2 if isinstance(hidden, tuple) else 1))


class Size(Two):
    def forward(self, x: Tensor) -> Tensor:
        size = self.first(x).shape
        return self.second(self.first(x) * (2 if isinstance(size, tuple) else 1))


class Length(Two):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[0]
        return self.second(self.first(x) * (2 if isinstance(length, int) else 1))


class IsTensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * (2 if isinstance(hidden, (list, Tensor)) else 1))


class BothInALine(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        factor = 2 if not isinstance(hidden, list) and isinstance(hidden, Tensor) else 1
        return self.second(hidden * factor)


class Shadowed(Two):
    def forward(self, x: Tensor) -> Tensor:
        list = Tensor
        hidden = self.first(x)
        return self.second(hidden * (2 if isinstance(hidden, list) else 1))


class Given(Two):
    kinds = (Tensor,)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * (2 if isinstance(hidden, self.kinds) else 1))


@pytest.mark.parametrize("model", [Chunks, Largest, Size, Length, IsTensor, BothInALine, Shadowed, Given])
def test_what_may_be_no_tensor_and_what_a_tensor_may_be_refuse_the_region(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, "it asks for the type of a value (isinstance)")
    assert_equals_oracle(adapted, base, X)
    assert differ(base(X), base.second(base.first(X)))
