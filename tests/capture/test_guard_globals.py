"""Guard: globals, class attributes, buffers and constants, which a naive trace writes, or reads, once for all calls."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from capture.checks import (
    adapt,
    assert_close,
    assert_equals_oracle,
    assert_refused,
    differ,
    fresh,
    inputs,
    naive,
    oracle,
    spied,
)
from capture.models import Two
from torch import Tensor, fx, nn

import hra_fx

X = inputs(4, 6)


SHARED: dict[str, Tensor] = {}


class ModuleCache(Two):
    """The cache is a global of the model's file."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if "gain" not in SHARED:
            SHARED["gain"] = hidden.new_full((8,), 2.0)
        return self.second(hidden * SHARED["gain"])


class ClassCache(Two):
    """The cache belongs to the class."""

    table: ClassVar[dict[str, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if "gain" not in self.table:
            self.table["gain"] = hidden.new_full((8,), 2.0)
        return self.second(hidden * self.table["gain"])


def test_a_cache_of_the_class_holds_no_proxy() -> None:
    ClassCache.table.clear()
    adapted, base = adapt(ClassCache())
    assert not ClassCache.table
    assert_equals_oracle(adapted, base, X)
    ClassCache.table.clear()


def test_a_cache_that_the_process_filled_before_is_read_by_value() -> None:
    """Where the model ran once, its global cache is filled with tensors, and no trace writes it."""
    SHARED.clear()
    fresh(ModuleCache())(X)
    adapted, base = adapt(ModuleCache())
    assert_equals_oracle(adapted, base, X)
    assert not isinstance(SHARED["gain"], fx.Proxy)
    SHARED.clear()


def test_an_empty_global_cache_raises_nothing_out_of_transform() -> None:
    SHARED.clear()
    adapted, base = adapt(ModuleCache())
    SHARED.clear()
    assert_equals_oracle(adapted, base, X)
    SHARED.clear()


CALLS = [0]


class GlobalCounter(Two):
    """Traces differ, and that is all that can be seen."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        return self.second(self.first(x) * CALLS[0])


class GlobalToggle(Two):
    """Every second trace agrees."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] = 1 - CALLS[0]
        return self.second(self.first(x) * (1 + CALLS[0]))


@pytest.mark.parametrize("model", [GlobalCounter, GlobalToggle])
def test_a_global_counter_makes_two_traces_differ(model: type[nn.Module]) -> None:
    CALLS[0] = 0
    graph = naive(fresh(model()))
    assert not differ(graph(X), graph(X)), "naive: the count of the trace, for ever"
    CALLS[0] = 0
    adapted, base = adapt(model())
    assert_refused(adapted, "CALLS, which is global")
    for _ in range(3):
        assert_equals_oracle_once(adapted, base)


def assert_equals_oracle_once(adapted: nn.Module, base: nn.Module) -> None:
    before = CALLS[0]
    found = adapted(X)
    CALLS[0] = before
    expected = oracle(adapted, base)(X)
    assert_close(found.detach(), expected.detach())


class Buffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.write(hidden)
        return self.second(hidden - self.mean)

    def write(self, hidden: Tensor) -> None:
        self.count.add_(1)
        self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))


class BufferCopy(Buffer):
    def write(self, hidden: Tensor) -> None:
        self.mean.copy_(hidden.detach().mean(0))
        self.count.data.add_(1)


class BufferOperator(Buffer):
    def write(self, hidden: Tensor) -> None:
        self.count += 1
        self.mean[:4] = hidden.detach().mean(0)[:4]


class BufferRebound(Buffer):
    def write(self, hidden: Tensor) -> None:
        self.count = self.count + 1
        self.mean = 0.5 * self.mean + 0.5 * hidden.detach().mean(0)


class BufferInTraining(Buffer):
    def write(self, hidden: Tensor) -> None:
        if self.training:
            self.count.add_(1)
            self.mean.lerp_(hidden.detach().mean(0), 0.25)


@pytest.mark.parametrize("model", [Buffer, BufferCopy, BufferOperator, BufferRebound, BufferInTraining])
def test_buffers_are_written_by_calls_and_never_by_a_trace(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert int(adapted.count) == 0 and not adapted.mean.any()
    assert_equals_oracle(adapted, base, X, modes=(True, True, False, True))
    assert int(adapted.count) == (3 if model is BufferInTraining else 4)


@pytest.mark.parametrize("model", [Buffer, BufferCopy, BufferInTraining])
def test_in_place_updates_of_buffers_are_nodes(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert hra_fx.report(adapted).rows[0].region == "whole"
    spy = spied(adapted, X)
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 3


def test_naive_trace_updates_a_buffer_once() -> None:
    base = fresh(Buffer())
    graph = fx.symbolic_trace(base)
    count = int(base.count)
    graph(X), graph(X)
    assert count == 1 and int(base.count) == 1


class Constant(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + torch.arange(8.0, dtype=torch.float64))


class ConstantOfModule(Two):
    """A tensor attribute that is no buffer; the trace gives it no new name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(8.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.table)


def test_a_tensor_made_in_forward_refuses_the_region_and_is_not_left_behind() -> None:
    base = fresh(Constant())
    fx.symbolic_trace(base)
    assert "_tensor_constant0" in vars(base), "naive: it is left in the real model"
    adapted, base = adapt(Constant())
    assert_refused(adapted, "_tensor_constant0")
    assert "_tensor_constant0" not in vars(adapted)
    assert_equals_oracle(adapted, base, X)


def test_a_tensor_attribute_is_read_at_each_call() -> None:
    adapted, base = adapt(ConstantOfModule())
    assert_equals_oracle(adapted, base, X)
    for subject in (adapted, base):
        subject.table = torch.full((8,), -3.0, dtype=torch.float64)
    assert_equals_oracle(adapted, base, X)
    for subject in (adapted, base):
        subject.table.mul_(2)
    assert_equals_oracle(adapted, base, X)


class Toggles(Two):
    """Puts itself into another mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.second.eval()
        return self.second(self.first(x))


def test_a_forward_that_changes_modes_refuses_the_region() -> None:
    adapted, base = adapt(Toggles())
    assert_refused(adapted, "second.training")
    assert adapted.second.training and base.second.training
    assert_equals_oracle(adapted, base, X)
